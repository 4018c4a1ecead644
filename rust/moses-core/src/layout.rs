//! How each model type names its experts on disk: a table, so that a new type is an entry and no code.
//!
//! Sources: the modules and weight conversions of transformers 5 (`models/*/modeling_*.py`, `conversion_mapping.py`) and the
//! published checkpoints. A *role* is what a stretch of an expert's bytes is, whatever the layout: `gate`, `up`, `down`.

use serde_json::Value;

use crate::document::Document;

/// How the experts of a layer lie in files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A tensor for each expert and map, as most types are published.
    PerExpert,
    /// One tensor for all experts, the expert being the first axis.
    Fused,
    /// Fused and quantised to MXFP4: blocks and scales, the expert being the first axis of both.
    Mxfp4,
}

impl Layout {
    /// Its name in commands and documents.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::PerExpert => "per-expert",
            Self::Fused => "fused",
            Self::Mxfp4 => "mxfp4",
        }
    }

    /// The layout of this name.
    #[must_use]
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::PerExpert, Self::Fused, Self::Mxfp4].into_iter().find(|layout| layout.name() == name)
    }
}

/// What a tensor of the gate holds for each expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateKind {
    /// The row whose product with the token is the expert's logit.
    Row,
    /// A bias that the selection of experts adds: at -1e4 an expert is never chosen.
    Bias,
}

/// A tensor of the gate; its first axis is the expert.
#[derive(Debug)]
pub struct GateName {
    /// Its path below the block.
    pub name: &'static str,
    /// What it holds.
    pub kind: GateKind,
}

/// One layout of one model type.
#[derive(Debug)]
pub struct LayoutNames {
    /// Which.
    pub layout: Layout,
    /// The path of the experts below the block.
    pub experts: &'static str,
    /// The tensors of an expert (per-expert: after its number) or of all, and the roles in them, one after the other.
    pub tensors: &'static [(&'static str, &'static [&'static str])],
    /// The path of the gate's module below the block.
    pub gate_module: &'static str,
    /// The tensors of the gate: rows first.
    pub gates: &'static [GateName],
}

/// Routing that first selects groups of experts.
#[derive(Debug)]
pub struct Groups {
    /// Config key of the number of groups.
    pub count: &'static str,
    /// Config key of how many groups a token uses.
    pub selected: &'static str,
    /// It counts only where this config key has this value.
    pub only_if: Option<(&'static str, &'static str)>,
    /// The fewest experts that a group may have.
    pub least: u64,
}

/// What a model becomes whose layers have one expert each.
#[derive(Debug)]
pub struct Dense {
    /// Its model type.
    pub model_type: &'static str,
    /// It computes the same only where each of these config keys has this value (JSON).
    pub only_if: &'static [Condition],
    /// How its architectures are named: the beginning of the name that is replaced, and by what.
    pub architecture: (&'static str, &'static str),
    /// Where a role goes below the block.
    pub tensors: &'static [(&'static str, &'static str)],
    /// Tensors below the block that stand for nothing where the conditions hold, and are left out.
    pub leave_out: &'static [&'static str],
    /// Config keys that mean nothing any more.
    pub drop: &'static [&'static [&'static str]],
    /// Config keys that the dense class would read differently if they were missing, with what they are then set to (JSON).
    pub defaults: &'static [(&'static str, &'static str)],
}

/// A config key, the value that it must have, and the value that the class reads where it is missing (JSON).
pub type Condition = (&'static str, &'static str, &'static str);

/// A model type.
#[derive(Debug)]
pub struct ModelType {
    /// `model_type` in its config.json.
    pub name: &'static str,
    /// Config keys of the number of experts, those that are read; the ones that are there are written.
    pub num_experts: &'static [&'static str],
    /// Keys that are written whether they are there or not: one version of transformers reads the one, another the other.
    pub always_written: &'static [&'static str],
    /// Config keys of the number of experts that a token uses.
    pub top_k: &'static [&'static str],
    /// Config key of an expert's width.
    pub expert_width: &'static str,
    /// Routing by groups.
    pub groups: Option<Groups>,
    /// Its layouts.
    pub layouts: &'static [LayoutNames],
    /// The dense types, the first whose conditions hold being taken.
    pub dense: &'static [Dense],
}

const ROW: GateName = GateName { name: "mlp.gate.weight", kind: GateKind::Row };
const CORRECTION: GateName = GateName { name: "mlp.gate.e_score_correction_bias", kind: GateKind::Bias };

const QWEN_TENSORS: &[(&str, &[&str])] =
    &[("gate_proj.weight", &["gate"]), ("up_proj.weight", &["up"]), ("down_proj.weight", &["down"])];
const FUSED_TENSORS: &[(&str, &[&str])] = &[("gate_up_proj", &["gate", "up"]), ("down_proj", &["down"])];

const fn below_mlp(
    layout: Layout,
    tensors: &'static [(&'static str, &'static [&'static str])],
    gates: &'static [GateName],
) -> LayoutNames {
    LayoutNames { layout, experts: "mlp.experts", tensors, gate_module: "mlp.gate", gates }
}

const PLAIN: &[LayoutNames] =
    &[below_mlp(Layout::PerExpert, QWEN_TENSORS, &[ROW]), below_mlp(Layout::Fused, FUSED_TENSORS, &[ROW])];
const CORRECTED: &[LayoutNames] = &[
    below_mlp(Layout::PerExpert, QWEN_TENSORS, &[ROW, CORRECTION]),
    below_mlp(Layout::Fused, FUSED_TENSORS, &[ROW, CORRECTION]),
];
const ROUTER: &[GateName] = &[
    GateName { name: "mlp.router.weight", kind: GateKind::Row },
    GateName { name: "mlp.router.bias", kind: GateKind::Bias },
];
const DENSE_MLP: &[(&str, &str)] =
    &[("gate", "mlp.gate_proj.weight"), ("up", "mlp.up_proj.weight"), ("down", "mlp.down_proj.weight")];
const MOE_KEYS: &[&str] = &[
    "num_experts",
    "num_local_experts",
    "num_experts_per_tok",
    "norm_topk_prob",
    "output_router_logits",
    "router_aux_loss_coef",
    "router_jitter_noise",
    "decoder_sparse_step",
    "mlp_only_layers",
    "moe_intermediate_size",
    "shared_expert_intermediate_size",
];

/// No shared expert: it is of width 0, and what its own gate weighs is nothing.
const NO_SHARED: Condition = ("shared_expert_intermediate_size", "0", "5632");
const SHARED: &[&str] = &[
    "mlp.shared_expert.gate_proj.weight",
    "mlp.shared_expert.up_proj.weight",
    "mlp.shared_expert.down_proj.weight",
    "mlp.shared_expert_gate.weight",
];

/// The model types that surgery knows.
pub const MODEL_TYPES: &[ModelType] = &[
    ModelType {
        name: "mixtral",
        num_experts: &["num_local_experts", "num_experts"],
        always_written: &["num_local_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "intermediate_size",
        groups: None,
        layouts: &[
            LayoutNames {
                layout: Layout::PerExpert,
                experts: "block_sparse_moe.experts",
                tensors: &[("w1.weight", &["gate"]), ("w3.weight", &["up"]), ("w2.weight", &["down"])],
                gate_module: "block_sparse_moe.gate",
                gates: &[GateName { name: "block_sparse_moe.gate.weight", kind: GateKind::Row }],
            },
            below_mlp(Layout::Fused, FUSED_TENSORS, &[ROW]),
        ],
        dense: &[Dense {
            model_type: "mistral",
            only_if: &[],
            architecture: ("Mixtral", "Mistral"),
            tensors: DENSE_MLP,
            leave_out: &[],
            drop: &[MOE_KEYS],
            defaults: &[("sliding_window", "null"), ("rms_norm_eps", "1e-05")],
        }],
    },
    ModelType {
        name: "qwen2_moe",
        num_experts: &["num_experts", "num_local_experts"],
        always_written: &["num_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "moe_intermediate_size",
        groups: None,
        layouts: PLAIN,
        dense: &[
            Dense {
                model_type: "qwen2",
                only_if: &[NO_SHARED, ("qkv_bias", "true", "true")],
                architecture: ("Qwen2Moe", "Qwen2"),
                tensors: DENSE_MLP,
                leave_out: SHARED,
                drop: &[MOE_KEYS, &["qkv_bias"]],
                defaults: &[("num_key_value_heads", "16"), ("sliding_window", "0")],
            },
            Dense {
                model_type: "llama",
                only_if: &[NO_SHARED, ("qkv_bias", "false", "true"), ("use_sliding_window", "false", "false")],
                architecture: ("Qwen2Moe", "Llama"),
                tensors: DENSE_MLP,
                leave_out: SHARED,
                drop: &[
                    MOE_KEYS,
                    &["qkv_bias", "use_sliding_window", "sliding_window", "max_window_layers", "layer_types"],
                ],
                defaults: &[("num_key_value_heads", "16"), ("max_position_embeddings", "32768")],
            },
        ],
    },
    ModelType {
        name: "qwen3_moe",
        num_experts: &["num_experts", "num_local_experts"],
        always_written: &["num_experts", "num_local_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "moe_intermediate_size",
        groups: None,
        layouts: PLAIN,
        dense: &[Dense {
            model_type: "qwen3",
            only_if: &[],
            architecture: ("Qwen3Moe", "Qwen3"),
            tensors: DENSE_MLP,
            leave_out: &[],
            drop: &[MOE_KEYS],
            defaults: &[("sliding_window", "null")],
        }],
    },
    ModelType {
        name: "olmoe",
        num_experts: &["num_experts", "num_local_experts"],
        always_written: &["num_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "intermediate_size",
        groups: None,
        layouts: PLAIN,
        dense: &[],
    },
    ModelType {
        name: "flex_olmo",
        num_experts: &["num_experts", "num_local_experts"],
        always_written: &["num_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "intermediate_size",
        groups: None,
        layouts: PLAIN,
        dense: &[Dense {
            model_type: "olmo2",
            only_if: &[],
            architecture: ("FlexOlmo", "Olmo2"),
            tensors: DENSE_MLP,
            leave_out: &[],
            drop: &[MOE_KEYS],
            defaults: &[
                ("max_position_embeddings", "4096"),
                ("rms_norm_eps", "1e-06"),
                ("pad_token_id", "100277"),
                ("eos_token_id", "100257"),
            ],
        }],
    },
    ModelType {
        name: "deepseek_v2",
        num_experts: &["n_routed_experts", "num_local_experts", "num_experts"],
        always_written: &["n_routed_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "moe_intermediate_size",
        groups: Some(Groups {
            count: "n_group",
            selected: "topk_group",
            only_if: Some(("topk_method", "group_limited_greedy")),
            least: 1,
        }),
        layouts: PLAIN,
        dense: &[],
    },
    ModelType {
        name: "deepseek_v3",
        num_experts: &["n_routed_experts", "num_local_experts", "num_experts"],
        always_written: &["n_routed_experts"],
        top_k: &["num_experts_per_tok"],
        expert_width: "moe_intermediate_size",
        // A group's score is the sum of its two best experts.
        groups: Some(Groups { count: "n_group", selected: "topk_group", only_if: None, least: 2 }),
        layouts: CORRECTED,
        dense: &[],
    },
    ModelType {
        name: "gpt_oss",
        num_experts: &["num_local_experts", "num_experts"],
        always_written: &["num_local_experts"],
        top_k: &["num_experts_per_tok", "experts_per_token"],
        expert_width: "intermediate_size",
        groups: None,
        layouts: &[
            // Gate and up are interleaved, so they are one role.
            LayoutNames {
                layout: Layout::Fused,
                experts: "mlp.experts",
                tensors: &[
                    ("gate_up_proj", &["gate_up"]),
                    ("gate_up_proj_bias", &["gate_up_bias"]),
                    ("down_proj", &["down"]),
                    ("down_proj_bias", &["down_bias"]),
                ],
                gate_module: "mlp.router",
                gates: ROUTER,
            },
            LayoutNames {
                layout: Layout::Mxfp4,
                experts: "mlp.experts",
                tensors: &[
                    ("gate_up_proj_blocks", &["gate_up_blocks"]),
                    ("gate_up_proj_scales", &["gate_up_scales"]),
                    ("gate_up_proj_bias", &["gate_up_bias"]),
                    ("down_proj_blocks", &["down_blocks"]),
                    ("down_proj_scales", &["down_scales"]),
                    ("down_proj_bias", &["down_bias"]),
                ],
                gate_module: "mlp.router",
                gates: ROUTER,
            },
        ],
        dense: &[],
    },
];

impl ModelType {
    /// The entry of a model type.
    #[must_use]
    pub fn find(name: &str) -> Option<&'static Self> {
        MODEL_TYPES.iter().find(|entry| entry.name == name)
    }

    /// The dense type that computes what one expert in each layer of a model with this config does.
    #[must_use]
    pub fn dense(&self, config: &Document) -> Option<&'static Dense> {
        let holds = |(key, value, missing): &Condition| {
            let found = config.get(key).or_else(|| serde_json::from_str(missing).ok());
            found == serde_json::from_str::<Value>(value).ok()
        };
        self.dense.iter().find(|dense| dense.only_if.iter().all(holds))
    }

    /// Its names in a layout.
    #[must_use]
    pub fn names(&self, layout: Layout) -> Option<&'static LayoutNames> {
        self.layouts.iter().find(|names| names.layout == layout)
    }
}

/// The FFN of a block of the dense types that can be upcycled (llama, mistral, qwen2, qwen3, olmo2): where a role lies.
pub const DENSE_FFN: &[(&str, &str)] = DENSE_MLP;
