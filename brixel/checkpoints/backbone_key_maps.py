"""The checkpoint formats of DINOv3, DINOv2 and SigLIP: Meta's, Hugging Face's, timm's. Facts: `docs/backbones.md`."""

import math
from dataclasses import replace
from fnmatch import fnmatchcase

import torch
from einops import rearrange
from torch import Tensor

from brixel.checkpoints.key_mapping import KeyMap, State, layer_keys


def fold_bias_mask(state: State) -> State:
    """Multiply the biases of q, k, v by their mask. A mask that is absent or NaN (never filled in) means 1, 0, 1."""
    folded = dict(state)
    for key, bias in state.items():
        if key.endswith(".attn.qkv.bias") and bias.ndim == 1:
            default = torch.ones_like(bias)
            third = len(bias) // 3
            default[third : 2 * third] = 0
            mask = folded.get(f"{key}_mask", default)
            if mask.shape == bias.shape:  # a mask of another shape stays, and is refused as an unknown key
                folded.pop(f"{key}_mask", None)
                folded[key] = bias * torch.where(mask.isnan(), default, mask).to(bias.dtype)
    return folded


def prepend_class_position(state: State) -> State:
    """Prepend a zero position for the class token: with registers, timm adds its position to the token itself."""
    if "reg_token" not in state or "pos_embed" not in state:
        return state
    positions: Tensor = state["pos_embed"]
    return {**state, "pos_embed": torch.cat([torch.zeros_like(positions[:, :1]), positions], dim=1)}


def unfold_tables(state: State) -> State:
    """Bring positions to (1, h*w, D), and a patch embedding that is a linear layer to a convolution."""
    unfolded = dict(state)
    for key in ("embeddings.position_embedding.weight", "embeds.pos_embed"):
        if key in state:
            table = state[key]
            if table.ndim == 4 and table.shape[1] == table.shape[2]:
                table = rearrange(table, "b h w d -> b (h w) d")
            unfolded[key] = rearrange(table, "n d -> 1 n d") if table.ndim == 2 else table
    for key in ("embeddings.patch_embedding.weight", "embeds.proj.weight"):
        if key in state and state[key].ndim == 2:
            unfolded[key] = _as_convolution(state[key])
    return unfolded


def _as_convolution(weight: Tensor) -> Tensor:
    """The convolution (D, 3, p, p) that a linear layer (D, p*p*3) on flattened patches is, if its sizes fit."""
    side = math.isqrt(weight.shape[1] // 3)
    if side == 0 or 3 * side * side != weight.shape[1]:
        return weight
    return rearrange(weight, "d (y x colour) -> d colour y x", y=side, x=side).contiguous()


# the parts that Meta's and timm's layouts share
_EMBEDDING = {
    "positions": ("pos_embed",),
    **layer_keys("patch_embed", "patch_embed.proj"),
    **layer_keys("norm", "norm"),
}
_OUTER = {"cls_token": ("cls_token",), **_EMBEDDING}
_PLAIN_BLOCK = {
    **layer_keys("blocks.{i}.norm1", "blocks.{i}.norm1"),
    **layer_keys("blocks.{i}.norm2", "blocks.{i}.norm2"),
    **layer_keys("blocks.{i}.attention.qkv", "blocks.{i}.attn.qkv"),
    **layer_keys("blocks.{i}.attention.out", "blocks.{i}.attn.proj"),
    **layer_keys("blocks.{i}.ffn.up", "blocks.{i}.mlp.fc1"),
    **layer_keys("blocks.{i}.ffn.down", "blocks.{i}.mlp.fc2"),
}
_BLOCK = {
    **_PLAIN_BLOCK,
    "blocks.{i}.scale1": ("blocks.{i}.ls1.gamma",),
    "blocks.{i}.scale2": ("blocks.{i}.ls2.gamma",),
}
_GATED_DOWN = (r"\.mlp\.w3\.", ".mlp.fc2.")  # the last layer of a gated feed-forward

DINOV3_META = KeyMap(
    name="DINOv3 in Meta's layout",
    marks=("storage_tokens", "blocks.0.ls1.gamma", "blocks.0.attn.qkv.weight"),
    unmarked=("pos_embed",),
    tensors={
        **_OUTER,
        **_BLOCK,
        "registers": ("storage_tokens",),
        **layer_keys("blocks.{i}.ffn.gate_up", "blocks.{i}.mlp.w1", "blocks.{i}.mlp.w2"),
    },
    dropped=("mask_token", "rope_embed.periods", "local_cls_norm.weight", "local_cls_norm.bias"),
    unfilled=(".attn.qkv.bias_mask",),
    aliases=(_GATED_DOWN,),
    prepare=fold_bias_mask,
    options={"rope_rounding": "bfloat16"},  # as the released files' `rope_embed.periods` are
)

DINOV3_HUGGINGFACE = KeyMap(
    name="DINOv3 in Hugging Face's layout",
    marks=("embeddings.register_tokens", "layer.0.attention.q_proj.weight"),
    unmarked=("embeddings.position_embeddings",),
    tensors={
        "cls_token": ("embeddings.cls_token",),
        "registers": ("embeddings.register_tokens",),
        **layer_keys("patch_embed", "embeddings.patch_embeddings"),
        **layer_keys("norm", "norm"),
        **layer_keys("blocks.{i}.norm1", "layer.{i}.norm1"),
        **layer_keys("blocks.{i}.norm2", "layer.{i}.norm2"),
        **layer_keys("blocks.{i}.attention.qkv", *(f"layer.{{i}}.attention.{part}_proj" for part in "qkv")),
        **layer_keys("blocks.{i}.attention.out", "layer.{i}.attention.o_proj"),
        "blocks.{i}.scale1": ("layer.{i}.layer_scale1.lambda1",),
        "blocks.{i}.scale2": ("layer.{i}.layer_scale2.lambda1",),
        **layer_keys("blocks.{i}.ffn.up", "layer.{i}.mlp.up_proj"),
        **layer_keys("blocks.{i}.ffn.down", "layer.{i}.mlp.down_proj"),
        **layer_keys("blocks.{i}.ffn.gate_up", "layer.{i}.mlp.gate_proj", "layer.{i}.mlp.up_proj"),
    },
    zeros=frozenset({"layer.{i}.attention.k_proj.bias"}),
    dropped=("embeddings.mask_token",),
    aliases=((r"^model\.layer\.", "layer."),),
)

DINOV3_TIMM = KeyMap(
    name="DINOv3 in timm's layout",
    marks=("reg_token", "blocks.0.gamma_1", "blocks.0.attn.qkv.weight"),
    unmarked=("pos_embed",),
    tensors={
        **_OUTER,
        **_BLOCK,
        "registers": ("reg_token",),
        "blocks.{i}.attention.qkv.bias": tuple(f"blocks.{{i}}.attn.{part}_bias" for part in "qkv"),
        "blocks.{i}.scale1": ("blocks.{i}.gamma_1",),
        "blocks.{i}.scale2": ("blocks.{i}.gamma_2",),
        **layer_keys("blocks.{i}.ffn.gate_up", "blocks.{i}.mlp.fc1_g", "blocks.{i}.mlp.fc1_x"),
    },
    zeros=frozenset(f"blocks.{{i}}.attn.{part}_bias" for part in "qkv"),
)

DINOV2_META = KeyMap(
    name="DINOv2 in Meta's layout",
    marks=("pos_embed", "mask_token", "blocks.0.ls1.gamma"),
    unmarked=("reg_token", "register_tokens"),
    tensors={
        **_OUTER,
        **_BLOCK,
        "registers": ("register_tokens",),
        **layer_keys("blocks.{i}.ffn.gate_up", "blocks.{i}.mlp.w12"),
    },
    dropped=("mask_token",),
    aliases=(_GATED_DOWN,),
    options={"position_antialias": False, "position_scale_offset": 0.1},
)
# without the mask token, which a training may leave out, the names of gated layers and of registers are Meta's
DINOV2_META_GATED = replace(DINOV2_META, marks=("pos_embed", "blocks.0.mlp.w12.weight", "blocks.0.ls1.gamma"))
# the release with registers dropped the offset and brought antialiasing
DINOV2_META_REGISTERS = replace(
    DINOV2_META,
    name="DINOv2 with registers in Meta's layout",
    marks=("pos_embed", "register_tokens", "blocks.0.ls1.gamma"),
    unmarked=("reg_token",),
    options={"position_antialias": True, "position_scale_offset": 0.0},
)

DINOV2_HUGGINGFACE = KeyMap(
    name="DINOv2 in Hugging Face's layout",
    marks=("embeddings.position_embeddings", "encoder.layer.0.attention.attention.query.weight"),
    unmarked=("embeddings.register_tokens",),
    tensors={
        "cls_token": ("embeddings.cls_token",),
        "positions": ("embeddings.position_embeddings",),
        "registers": ("embeddings.register_tokens",),
        **layer_keys("patch_embed", "embeddings.patch_embeddings.projection"),
        **layer_keys("norm", "layernorm"),
        **layer_keys("blocks.{i}.norm1", "encoder.layer.{i}.norm1"),
        **layer_keys("blocks.{i}.norm2", "encoder.layer.{i}.norm2"),
        **layer_keys(
            "blocks.{i}.attention.qkv",
            *(f"encoder.layer.{{i}}.attention.attention.{part}" for part in ("query", "key", "value")),
        ),
        **layer_keys("blocks.{i}.attention.out", "encoder.layer.{i}.attention.output.dense"),
        "blocks.{i}.scale1": ("encoder.layer.{i}.layer_scale1.lambda1",),
        "blocks.{i}.scale2": ("encoder.layer.{i}.layer_scale2.lambda1",),
        **layer_keys("blocks.{i}.ffn.up", "encoder.layer.{i}.mlp.fc1"),
        **layer_keys("blocks.{i}.ffn.down", "encoder.layer.{i}.mlp.fc2"),
        **layer_keys("blocks.{i}.ffn.gate_up", "encoder.layer.{i}.mlp.weights_in"),
    },
    dropped=("embeddings.mask_token",),
    aliases=(
        (r"\.mlp\.weights_out\.", ".mlp.fc2."),
        (r"\.attention\.q_proj\.", ".attention.attention.query."),
        (r"\.attention\.k_proj\.", ".attention.attention.key."),
        (r"\.attention\.v_proj\.", ".attention.attention.value."),
        (r"\.attention\.o_proj\.", ".attention.output.dense."),
    ),
    options={"position_antialias": False, "position_scale_offset": 0.0},
)
DINOV2_HUGGINGFACE_REGISTERS = replace(
    DINOV2_HUGGINGFACE,
    name="DINOv2 with registers in Hugging Face's layout",
    marks=(*DINOV2_HUGGINGFACE.marks, "embeddings.register_tokens"),
    unmarked=(),
    options={"position_antialias": True, "position_scale_offset": 0.0},
)

DINOV2_TIMM = KeyMap(
    name="DINOv2 in timm's layout",
    marks=("pos_embed", "blocks.0.ls1.gamma", "patch_embed.proj.weight"),
    unmarked=("mask_token",),
    tensors={
        **_OUTER,
        **_BLOCK,
        "registers": ("reg_token",),
        **layer_keys("blocks.{i}.ffn.gate_up", "blocks.{i}.mlp.fc1"),
    },
    prepare=prepend_class_position,
    options={"position_antialias": True, "position_scale_offset": 0.0},
)

# the word embeddings of the text tower, in files of both towers; the key maps below leave them unread
VOCABULARY = "text_model.embeddings.token_embedding.weight"
_NAFLEX_POSITIONS = {"position_antialias": True, "position_scale_offset": 0.0, "position_mode": "bilinear"}

SIGLIP_HUGGINGFACE = KeyMap(
    name="SigLIP in Hugging Face's layout",
    marks=("embeddings.position_embedding.weight", "encoder.layers.0.self_attn.q_proj.weight"),
    unmarked=("embeddings.class_embedding",),  # CLIP's
    axes={"embeddings.patch_embedding.weight": 4},
    tensors={
        "positions": ("embeddings.position_embedding.weight",),
        **layer_keys("patch_embed", "embeddings.patch_embedding"),
        **layer_keys("norm", "post_layernorm"),
        **layer_keys("blocks.{i}.norm1", "encoder.layers.{i}.layer_norm1"),
        **layer_keys("blocks.{i}.norm2", "encoder.layers.{i}.layer_norm2"),
        **layer_keys("blocks.{i}.attention.qkv", *(f"encoder.layers.{{i}}.self_attn.{part}_proj" for part in "qkv")),
        **layer_keys("blocks.{i}.attention.out", "encoder.layers.{i}.self_attn.out_proj"),
        **layer_keys("blocks.{i}.ffn.up", "encoder.layers.{i}.mlp.fc1"),
        **layer_keys("blocks.{i}.ffn.down", "encoder.layers.{i}.mlp.fc2"),
    },
    unread=(
        *("text_model.*", "logit_scale", "logit_bias"),
        *("head.probe", "head.attention.*", "head.layernorm.*", "head.mlp.*"),
    ),
    prepare=unfold_tables,
    options={"position_antialias": False, "position_scale_offset": 0.0, "position_mode": "bicubic"},
)
SIGLIP_NAFLEX_HUGGINGFACE = replace(
    SIGLIP_HUGGINGFACE,
    name="SigLIP 2 NaFlex in Hugging Face's layout",
    axes={"embeddings.patch_embedding.weight": 2},
    options=_NAFLEX_POSITIONS,
)

SIGLIP_TIMM = KeyMap(
    name="SigLIP in timm's layout",
    marks=("attn_pool.latent", "pos_embed", "patch_embed.proj.weight"),
    unmarked=("cls_token", "blocks.0.ls1.gamma"),
    tensors={**_EMBEDDING, **_PLAIN_BLOCK},
    unread=("attn_pool.*",),
    options={"position_antialias": True, "position_scale_offset": 0.0, "position_mode": "bicubic"},
)
SIGLIP_NAFLEX_TIMM = replace(
    SIGLIP_TIMM,
    name="SigLIP 2 NaFlex in timm's layout",
    marks=("attn_pool.latent", "embeds.pos_embed", "embeds.proj.weight"),
    tensors={**SIGLIP_TIMM.tensors, "positions": ("embeds.pos_embed",), **layer_keys("patch_embed", "embeds.proj")},
    prepare=unfold_tables,
    options=_NAFLEX_POSITIONS,
)

BRIXEL = KeyMap(
    name="brixel's own layout",
    marks=("patch_embed.weight", "blocks.0.attention.qkv.weight"),
    tensors={key: (key,) for key_map in (DINOV2_META, DINOV3_META) for key in key_map.tensors},
)
"""`backbone.safetensors` of a saved model. It holds no settings: the architecture must be given."""

KEY_MAPS = (
    DINOV3_META,
    DINOV3_HUGGINGFACE,
    DINOV3_TIMM,
    DINOV2_META,
    DINOV2_META_GATED,
    DINOV2_META_REGISTERS,
    DINOV2_HUGGINGFACE,
    DINOV2_HUGGINGFACE_REGISTERS,
    DINOV2_TIMM,
    SIGLIP_HUGGINGFACE,
    SIGLIP_NAFLEX_HUGGINGFACE,
    SIGLIP_TIMM,
    SIGLIP_NAFLEX_TIMM,
    BRIXEL,
)


def needed(name: str) -> bool:
    """Whether a tensor must be read: False where a format leaves it unread, whatever the prefix of its name."""
    unread = (pattern for key_map in KEY_MAPS for pattern in key_map.unread)
    return not any(fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}") for pattern in unread)
