"""Folders in the format compressed-tensors, which vLLM, SGLang and `transformers` load.

The library packs what the quantizer has rounded: it divides a weight by its scale, which gives back the integer or the
E2M1 float, and stores that in 4 or 8 bits. `config.json` describes the format. Embedding, norms and head stay in bf16.
"""

import importlib.metadata
import importlib.util
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from torch import Tensor

from osp.convert.file_format import Client, LlamaSource
from osp.convert.hf_export import HuggingFace, InTransformers, quiet
from osp.errors import UserError
from osp.model.sites import SITES, split_site
from osp.model_config import ModelConfig
from osp.quant.apply import Quantized
from osp.quant.deployed import DEPLOYED
from osp.quant.formats import NVFP4

PRESETS = ("w4a16_g32", "w8a8", "nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16")


class CompressedTensors(HuggingFace):
    """A folder of Hugging Face in which the matrices of the blocks are packed."""

    name = "compressed-tensors"
    schemes = {"W4A16": DEPLOYED["w4a16_g128"]} | {name.upper(): DEPLOYED[name] for name in PRESETS}
    dtypes = ()

    def dtype(self, scheme: str) -> torch.dtype:
        return torch.bfloat16

    def ffn_multiple(self, scheme: str) -> int:
        # vLLM's Marlin kernels for 4-bit weights have tiles of 64 x 128, its int8 kernels need multiples of 16
        return 16 if scheme == "W8A8" else 128

    def check(self, config: ModelConfig, tokenizer: Tokenizer, scheme: str) -> None:
        for library in ("compressed_tensors", "transformers"):
            if importlib.util.find_spec(library) is None:
                raise UserError(f"format={self.name} needs {library}: pip install -e '.[deploy]'")

    def write(self, source: LlamaSource, state: Quantized, scheme: str, path: Path) -> None:
        with quiet():
            from compressed_tensors.compressors import ModelCompressor
            from compressed_tensors.quantization import QuantizationConfig, QuantizationStatus

        super().write(source, state, scheme, path)
        described = library_scheme(scheme)
        about: dict[str, Any] = {"format": str(described.format), "quantization_status": QuantizationStatus.COMPRESSED}
        config = QuantizationConfig(config_groups={"blocks": described}, ignore=["lm_head"], **about)
        ModelCompressor(quantization_config=config).update_config(str(path))

    def pack(self, source: LlamaSource, state: Quantized, scheme: str) -> dict[str, dict[str, Tensor]]:
        from compressed_tensors.compressors import BaseCompressor

        described = library_scheme(scheme)
        compressor = BaseCompressor.get_value_from_registry(str(described.format))
        scales_of_tensors = {name: NVFP4.scale_of_tensor(x).cpu().reshape(1) for name, x in state.bounds.items()}
        inputs = {  # by the beginning of a matrix's names; clones, because the writer drops a tensor that it has seen
            f"layers.{layer}.{reader}.": {"input_global_scale": scales_of_tensors[name].clone()}
            for name, (layer, kind) in ((name, split_site(name)) for name in state.bounds)
            for reader in (SITES[kind].readers if kind in SITES else ())
        }
        packed = {}
        for name, grid in state.grids.items():
            module = name.removesuffix("weight")
            values: dict[str, Any] = {"weight": source.model.get_parameter(name).detach().cpu()}
            values["weight_scale"] = grid.scale[..., 0].cpu()
            if name in state.bounds:  # NVFP4: a block's scale is stored relative to the tensor's, in E4M3
                g = values["weight_global_scale"] = scales_of_tensors[name]
                values["weight_scale"] = (values["weight_scale"] * g).to(torch.float8_e4m3fn).float()
            parts = compressor.compress(values | inputs.get(module, {}), described)
            packed[name] = {module + part: tensor for part, tensor in parts.items()}
        return packed

    def open(self, path: Path, device: torch.device) -> Client:
        """Return the client with weights in fp32.

        The library unpacks E2M1 to bf16, which is exact before the division by NVFP4's scale of the tensor and not
        after it. So it unpacks with a scale of 1, and the division is done here.
        """
        with quiet():
            client = InTransformers(path, device)
            modules = [module for module in client.model.modules() if hasattr(module, "weight_global_scale")]
            scales = [module.weight_global_scale.data.clone() for module in modules]
            for module in modules:
                module.weight_global_scale.data.fill_(1)
            client.model.hf_quantizer.compressor.decompress_model(client.model)
        torch.nn.Module.float(client.model)
        for module, scale in zip(modules, scales, strict=True):
            module.weight.data.div_(scale)
        client.name += f" with compressed-tensors {importlib.metadata.version('compressed-tensors')}"
        return client


def library_scheme(scheme: str) -> Any:
    """Return the library's `QuantizationScheme` with its file format."""
    from compressed_tensors.compressors.format import infer_module_format
    from compressed_tensors.quantization import preset_name_to_scheme

    described: Any = preset_name_to_scheme(scheme.removesuffix("_G32"), targets=["Linear"])
    if scheme.endswith("_G32"):
        described.weights.group_size = 32
    described.format = infer_module_format(torch.nn.Linear, described).value
    return described
