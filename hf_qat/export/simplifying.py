"""What onnxscript's optimizer does to an exported graph, with no search for what is not there."""

from __future__ import annotations

from typing import Any


#: So often constants are folded and patterns replaced, at most: onnxscript's own default.
ROUNDS = 2


def simplify(model: Any) -> None:
    """Fold constants and replace patterns as `onnxscript.optimizer.optimize_ir` does, in place.

    Args:
        model: an `onnx_ir.Model`.
    """
    from onnx_ir.passes.common import RemoveUnusedNodesPass  # with onnxscript, an optional dependency
    from onnxscript.optimizer import fold_constants_ir, inline, optimize_ir
    from onnxscript.rewriter import RewritePass

    inline(model)
    replace_patterns = RewritePass(_rules(model))
    for _ in range(ROUNDS):
        folded = fold_constants_ir(model, onnx_shape_inference=True)
        replaced, cleaned = replace_patterns(model), RemoveUnusedNodesPass()(model)
        if not (folded.modified or replaced.modified or cleaned.modified):
            break
    optimize_ir(model, num_iterations=0)  # the passes that follow these rounds


def _rules(model: Any) -> list[Any]:
    """Onnxscript's patterns. For slices of one tensor it searches all nodes once for each node, a third of all the time."""
    from onnxscript import rewriter
    from onnxscript.rewriter.rules.common import slice_split_rule

    slices = sum(node.op_type == "Slice" for node in model.graph.all_nodes())
    return [rule for rule in rewriter._DEFAULT_REWRITE_RULES if slices > 1 or rule is not slice_split_rule]
