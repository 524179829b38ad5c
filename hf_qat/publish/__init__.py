"""From a directory to a repository on the Hub, whatever happens to the connection on the way."""

from hf_qat.publish.hub import push_directory


__all__ = ["push_directory"]
