"""From a module's forward to an FX graph."""
