"""What TI's ONNX model optimizer can mend: its rule, by ours and the operator.

Source: edgeai-tidl-tools, osrt-model-tools/osrt_model_tools/onnx_tools/tidl_onnx_model_optimizer/README.md.
"""

from __future__ import annotations


OPTIMIZER_RULES: dict[tuple[str, str], str] = {
    ("argmax-axis", "ArgMax"): "convert_unsupported_argmax_to_supported",
    ("argmax-keepdims", "ArgMax"): "convert_unsupported_argmax_to_supported",
    ("argmax-last", "ArgMax"): "convert_unsupported_argmax_to_supported",
    ("clip-range", "Clip"): "adjust_clip_minval_maxval",
    ("concat-axis", "Concat"): "convert_concat_unsupported_axis_to_channel",
    ("conv-padding", "Conv"): "convert_conv_large_pad_to_smaller_kernel",
    ("eltwise-vector", "Add"): "support_broadcast_ops_constant_input",
    ("eltwise-vector", "Mul"): "support_broadcast_ops_constant_input",
    ("eltwise-vector", "Sub"): "support_broadcast_ops_constant_input",
    ("eltwise-vector", "Div"): "support_broadcast_ops_constant_input",
    ("gather-indices", "Gather"): "convert_gather_scalar_to_1d",
    ("gemm-bias", "Gemm"): "convert_gemm_to_matmul_and_add",
    ("global-pool-plane", "GlobalAveragePool"): "convert_large_global_avg_pooling_to_matmul",
    ("matmul-vector", "MatMul"): "convert_matmul_with_1d_weight_to_2d_weight_and_reshape",
    ("needs-newer-tools", "Expand"): "convert_expand_to_reshape_and_concat",
    ("operator", "Einsum"): "replace_einsum_with_matmul_and_basic_ops",
    ("operator", "GatherND"): "convert_single_axis_gethernd_to_gather",
    ("operator", "Gelu"): "break_gelu_to_components",
    ("operator", "Mean"): "replace_mean_with_eltwise",
    ("operator", "ReduceL2"): "convert_reducel2_to_mul_reducesum_sqrt",
    ("operator", "Tile"): "convert_tile_to_expand_for_size1_dims",
    ("operator", "Where"): "remove_where_layer",
    ("pad-axes", "Pad"): "convert_pad_above_height_axis_to_height_axis",
    ("pool-kernel", "MaxPool"): "convert_maxpool_to_cascaded_maxpool",
    ("reduce-axis", "ReduceMax"): "convert_reducemax_for_height_axis",
    ("slice-step", "Slice"): "convert_non_singular_strided_slice_to_gather",
    ("softmax-axis", "Softmax"): "convert_softmax_unsupported_axis_to_width",
    ("space-block", "SpaceToDepth"): "convert_space2depth_to_reshp_tr_reshp",
    ("space-dims", "SpaceToDepth"): "convert_space2depth_to_reshp_tr_reshp",
    ("space-block", "DepthToSpace"): "convert_depth2space_to_reshp_tr_reshp",
    ("space-dims", "DepthToSpace"): "convert_depth2space_to_reshp_tr_reshp",
    ("transpose-width", "Transpose"): "break_transpose_of_width_to_dim1_dim2_of_input_more_than_4d",
    ("unsqueeze-dims", "Unsqueeze"): "convert_unsqueeze_to_reshape",
}
