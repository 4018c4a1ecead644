"""Where dense FFNs and mixtures of experts are in models of transformers, and which are refused."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from moses.errors import SurgeryError
from moses.growth.blocks import moe_blocks, parameter
from moses.growth.ffns import dense_ffns

DECODERS = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gpt2", "phi")
MIXTURES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "flex_olmo", "deepseek_v2", "deepseek_v3", "gpt_oss")


@pytest.mark.parametrize("family", DECODERS)
def test_dense_ffns_have_the_tensors_of_the_formula(tiny_model, family):
    model = tiny_model(family)
    found = dense_ffns(model)
    assert [ffn.index for ffn in found] == [0, 1]
    for ffn in found:
        assert ffn.path == ffn.block + ".mlp" and ffn.out.shape == (ffn.d_model, ffn.d_ff) == (32, ffn.d_ff)
        assert ffn.into.shape == (ffn.d_ff * (2 if ffn.kind == "gate_up_down" else 1), 32)
        assert ffn.block.endswith(str(ffn.index))


@pytest.mark.parametrize("family", ("llama", "gpt2", "phi"))
def test_load_is_the_inverse_of_reading(tiny_model, family):
    source, target = (dense_ffns(tiny_model(family, seed=seed))[0] for seed in (0, 1))
    target.load(source.into, source.out, source.into_bias, source.out_bias)
    x = torch.randn(3, 32)
    source.module.eval(), target.module.eval()
    assert torch.equal(source.module(x), target.module(x))


@pytest.mark.parametrize("family", MIXTURES)
def test_mixtures_name_tensors_with_experts_first(tiny_mixture, family):
    model = tiny_mixture(family)
    found = moe_blocks(model)
    assert [block.index for block in found] == ([1] if family == "deepseek_v3" else [0, 1])
    state = model.state_dict()
    for block in found:
        assert (block.num_experts, block.top_k) == (8, 2)
        for name in (*block.gate_tensors, *block.expert_tensors):
            assert state[name].shape[0] == 8 and parameter(model, name).data_ptr() == state[name].data_ptr()
        assert parameter(model, block.gate).shape == (8, 32)
    assert bool(found[0].shared) == family.startswith(("qwen2", "deepseek"))
    assert (found[0].gate_bias is not None) == (family == "gpt_oss") == found[0].interleaved == found[0].transposed
    assert (found[0].selection_bias is not None) == (family == "deepseek_v3")


def test_shared_experts_are_no_dense_ffns(tiny_mixture):
    model = tiny_mixture("deepseek_v3")
    assert [ffn.path for ffn in dense_ffns(model)] == ["model.layers.0.mlp"]


class Odd(nn.Module):
    """Looks like Llama's FFN and squares its hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(32, 48, bias=False), nn.Linear(32, 48, bias=False)
        self.down_proj, self.act_fn = nn.Linear(48, 32, bias=False), nn.SiLU()

    def forward(self, x):
        return self.down_proj((self.act_fn(self.gate_proj(x)) * self.up_proj(x)).square())


def test_what_cannot_be_upcycled_is_refused(tiny_model, tiny_mixture):
    for family in ("bert", "t5"):
        with pytest.raises(SurgeryError) as error:
            dense_ffns(tiny_model(family))
        assert error.value.code == "not_upcyclable"
    model = tiny_model("llama")
    model.model.layers[1].mlp = Odd()
    with pytest.raises(SurgeryError, match=r"model\.layers\.1\.mlp \(Odd\) computes something else"):
        dense_ffns(model)
    model = tiny_model("llama")
    model.model.layers[1].mlp.act_fn = nn.Softsign()
    with pytest.raises(SurgeryError, match="has the activation Softsign"):
        dense_ffns(model)
    with pytest.raises(SurgeryError, match="mixtures of experts"):
        dense_ffns(tiny_mixture("mixtral"))


def test_two_stacks_of_blocks_are_refused(tiny_model):
    model = tiny_model("llama")
    model.model.tower = nn.ModuleList([tiny_model("llama").model.layers[0]])
    with pytest.raises(SurgeryError, match=r"several stacks of blocks \(model\.layers, model\.tower\)") as error:
        dense_ffns(model)
    assert error.value.code == "not_upcyclable"


def test_a_mixture_of_unknown_form_is_refused(tiny_model):
    model = tiny_model("llama")
    model.model.layers[0].mlp.experts = nn.ModuleList([nn.Linear(32, 32)])
    with pytest.raises(SurgeryError) as error:
        moe_blocks(model)
    assert error.value.code == "unknown_mixture"
