"""One argument of `from_pretrained` puts our dispatch under the MoE classes of transformers: logits and gradients as eager's."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

import moses.transformers
from moses.plan import dispatch_plan

WIDE = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
CONFIGS = {
    "mixtral": lambda: hf.MixtralConfig(**WIDE, num_local_experts=4, num_experts_per_tok=2),
    "qwen2_moe": lambda: hf.Qwen2MoeConfig(
        **WIDE, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16
    ),
    "qwen3_moe": lambda: hf.Qwen3MoeConfig(
        **WIDE, num_experts=6, num_experts_per_tok=3, moe_intermediate_size=16, head_dim=8
    ),
    "olmoe": lambda: hf.OlmoeConfig(**WIDE, num_experts=6, num_experts_per_tok=2),
    "deepseek_v2": lambda: hf.DeepseekV2Config(
        **(WIDE | MLA),
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
    ),
    "deepseek_v3": lambda: hf.DeepseekV3Config(
        **(WIDE | MLA),
        n_routed_experts=8,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_group=2,
        topk_group=1,
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **WIDE, num_local_experts=4, num_experts_per_tok=2, head_dim=8, sliding_window=16
    ),
}


def model(family, implementation, folder):
    return hf.AutoModelForCausalLM.from_pretrained(folder / family, experts_implementation=implementation)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("moe")
    for family, make in CONFIGS.items():
        torch.manual_seed(0)
        made = hf.AutoModelForCausalLM.from_config(make())
        for name, parameter in made.named_parameters():
            if "expert" in name and "bias" in name:  # zeros would hide a bias that is not added
                torch.nn.init.normal_(parameter)
        made.save_pretrained(place / family)
    return place


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_and_gradients_are_eagers(family, dtype, folder):
    ids = torch.randint(3, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    found = []
    for implementation in ("eager", "moses"):
        made = model(family, implementation, folder).to(dtype).train()
        output = made(input_ids=ids, labels=ids)
        output.loss.backward()
        gradients = {name: p.grad for name, p in made.named_parameters() if p.grad is not None}
        found.append((output.logits.detach(), gradients))
    (eager, eager_grads), (ours, our_grads) = found
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 0.1, "atol": 0.03}
    torch.testing.assert_close(ours, eager, **tolerance)
    assert any("experts" in name for name in our_grads)
    for name, gradient in eager_grads.items():
        torch.testing.assert_close(
            our_grads[name], gradient, **tolerance, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("family", ["mixtral", "gpt_oss"])
def test_generation_is_eagers_and_our_op_is_what_runs(family, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(moses.transformers, "dispatch_plan", lambda *args: calls.append(args) or dispatch_plan(*args))
    ids = torch.randint(3, 61, (2, 5), generator=torch.Generator().manual_seed(2))
    texts = [
        model(family, name, folder).generate(ids, max_new_tokens=6, do_sample=False) for name in ("eager", "moses")
    ]
    assert torch.equal(*texts) and calls


def test_experts_of_other_ranks_add_nothing(folder):
    made = model("mixtral", "moses", folder)
    experts = made.model.layers[0].mlp.experts
    x, weights = torch.randn(6, 32), torch.rand(6, 2)
    ids = torch.tensor([[0, 1], [4, 2], [4, 4], [3, 0], [1, 4], [2, 3]])
    experts._is_expert_parallel = True
    found = experts(x, ids, weights)
    kept = torch.where(ids < 4, ids, 0), torch.where(ids < 4, weights, 0.0)
    experts._is_expert_parallel = False
    torch.testing.assert_close(found, experts(x, *kept))
    assert (found[2] == 0).all()
