"""The formats of files that inference engines run, and of `qat.scheme`; `configs/quant/NAME.yaml` has their values."""

from dataclasses import replace

from osp.quant.spec import QuantSpec

_FILE_OF_GGUF = {"embedding_and_head": True, "ends_format": "q8_0"}
_NVFP4_ACTIVATIONS = {"a_bits": 4, "a_format": "nvfp4", "o_proj_by_head": False, "calibration_tokens": 65_536}
_MXFP4_ACTIVATIONS = {"a_bits": 4, "a_format": "mxfp4", "o_proj_by_head": False}

DEPLOYED: dict[str, QuantSpec] = {
    "w4a16_g128": QuantSpec(w_bits=4, w_group_size=128),
    "w4a16_g32": QuantSpec(w_bits=4, w_group_size=32),
    "w8a8": QuantSpec(w_bits=8, a_bits=8, a_format="half", o_proj_by_head=False),
    "nvfp4": QuantSpec(w_bits=4, w_format="nvfp4", **_NVFP4_ACTIVATIONS),
    "nvfp4a16": QuantSpec(w_bits=4, w_format="nvfp4"),
    "mxfp4": QuantSpec(w_bits=4, w_format="mxfp4", **_MXFP4_ACTIVATIONS),
    "mxfp4a16": QuantSpec(w_bits=4, w_format="mxfp4"),
    "q4_0": QuantSpec(w_bits=4, w_format="q4_0", **_FILE_OF_GGUF),
    "q8_0": QuantSpec(w_bits=8, w_format="q8_0", **_FILE_OF_GGUF),
}
# Formats of `qat.scheme`, without clip search: its 80 roundings of each weight are too slow for a training step.
DEPLOYED |= {
    "qat_w4a16": replace(DEPLOYED["w4a16_g128"], w_clip=False),
    "qat_w4a8": replace(DEPLOYED["w8a8"], w_bits=4, w_group_size=128, w_clip=False),
    "qat_w4a4": QuantSpec(w_bits=4, a_bits=4, w_clip=False),
    "qat_nvfp4": replace(DEPLOYED["nvfp4"], w_clip=False),
    "qat_mxfp4": replace(DEPLOYED["mxfp4"], w_clip=False),
}
