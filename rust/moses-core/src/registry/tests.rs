//! The ledger against a naive model with sets, step by step; its bytes against damage.
#![allow(clippy::arithmetic_side_effects)]

use std::collections::{BTreeMap, BTreeSet};

use proptest::prelude::*;

use super::{Registry, Space};
use crate::{LayerId, Mask, TaskId};

/// What the model knows: layers with the units of their spaces, and of each live ended task its units.
#[derive(Default)]
struct Model {
    /// `(units per expert, experts)` of each layer; every layer has spaces "A" of that many units and "B" of twice.
    layers: Vec<(u64, u64)>,
    tasks: BTreeMap<u32, BTreeSet<(u32, usize, u64)>>,
    open: Option<u32>,
    begun: u32,
}

const UNIT_BYTES: [u64; 2] = [3, 2];
const SPACES: [&str; 2] = ["A", "B"];

impl Model {
    fn length(&self, layer: usize, space: usize) -> u64 {
        let (units, experts) = self.layers[layer];
        units * experts * (space as u64 + 1)
    }

    fn owner(&self, unit: &(u32, usize, u64)) -> Option<u32> {
        self.tasks.iter().find(|(_, units)| units.contains(unit)).map(|(&task, _)| task)
    }

    fn owned(&self, task: u32) -> Vec<(u32, usize, u64)> {
        self.tasks[&task].iter().copied().filter(|unit| self.owner(unit) == Some(task)).collect()
    }

    fn bytes<'a>(units: impl IntoIterator<Item = &'a (u32, usize, u64)>) -> u64 {
        units.into_iter().map(|unit| UNIT_BYTES[unit.1]).sum()
    }

    /// A value for each unit that no other unit has nearby.
    fn values<'a>(units: impl IntoIterator<Item = &'a (u32, usize, u64)>) -> Vec<u8> {
        let value = |&(layer, space, unit): &(u32, usize, u64)| {
            let bytes = (u64::from(layer) * 7919 + space as u64 * 104_729 + unit * 2_654_435_761).to_le_bytes();
            bytes[..UNIT_BYTES[space] as usize].to_vec()
        };
        units.into_iter().flat_map(value).collect()
    }
}

#[derive(Debug, Clone)]
enum Step {
    AddLayer {
        units: u64,
        experts: u64,
    },
    AddExperts {
        layer: prop::sample::Index,
        count: u64,
    },
    Begin,
    End {
        seed: Vec<(prop::sample::Index, bool, prop::sample::Index, u64)>,
    },
    Abandon,
    Forget {
        task: prop::sample::Index,
    },
    Narrow {
        task: prop::sample::Index,
        layer: prop::sample::Index,
        space: bool,
        start: prop::sample::Index,
        count: u64,
    },
    Reload,
}

fn any_step() -> impl Strategy<Value = Step> {
    let selected = (any::<prop::sample::Index>(), any::<bool>(), any::<prop::sample::Index>(), 1_u64..30);
    prop_oneof![
        1 => (1_u64..20, 1_u64..5).prop_map(|(units, experts)| Step::AddLayer { units, experts }),
        1 => (any::<prop::sample::Index>(), 1_u64..3).prop_map(|(layer, count)| Step::AddExperts { layer, count }),
        4 => Just(Step::Begin),
        4 => prop::collection::vec(selected, 0..8).prop_map(|seed| Step::End { seed }),
        1 => Just(Step::Abandon),
        2 => any::<prop::sample::Index>().prop_map(|task| Step::Forget { task }),
        2 => (any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<bool>(), any::<prop::sample::Index>(), 1_u64..30)
            .prop_map(|(task, layer, space, start, count)| Step::Narrow { task, layer, space, start, count }),
        1 => Just(Step::Reload),
    ]
}

fn apply(step: &Step, registry: &mut Registry, model: &mut Model) {
    match step {
        Step::AddLayer { units, experts } => {
            let space = |at: usize| Space {
                name: SPACES[at].to_owned(),
                units_per_expert: units * (at as u64 + 1),
                unit_bytes: UNIT_BYTES[at],
            };
            let name = format!("model.layers.{}.linear", model.layers.len());
            let id = registry.add_layer(&name, *experts, vec![space(0), space(1)]).unwrap();
            assert_eq!(id.0 as usize, model.layers.len());
            model.layers.push((*units, *experts));
        }
        Step::AddExperts { layer, count } => {
            if model.layers.is_empty() {
                return;
            }
            let layer = layer.index(model.layers.len());
            registry.add_experts(LayerId(layer as u32), *count).unwrap();
            model.layers[layer].1 += count;
        }
        Step::Begin => {
            let begun = registry.begin_task(&format!("task {}", model.begun), Some("domain"));
            if model.open.is_some() {
                assert_eq!(begun.unwrap_err().code(), "task_open");
                return;
            }
            assert_eq!(begun.unwrap(), TaskId(model.begun), "ids are given once");
            model.open = Some(model.begun);
            model.begun += 1;
        }
        Step::End { seed } => {
            let Some(task) = model.open else { return };
            let mut units: BTreeSet<(u32, usize, u64)> = BTreeSet::new();
            for (layer, space, start, count) in seed.iter().filter(|_| !model.layers.is_empty()) {
                let (layer, space) = (layer.index(model.layers.len()), usize::from(*space));
                let length = model.length(layer, space);
                let start = start.index(length as usize) as u64;
                units.extend((start..length.min(start + count)).map(|unit| (layer as u32, space, unit)));
            }
            let mut masks = Vec::new();
            for layer in 0..model.layers.len() {
                for space in [1, 0] {
                    let indices = units.iter().filter(|unit| (unit.0 as usize, unit.1) == (layer, space));
                    let indices: Vec<u64> = indices.map(|unit| unit.2).collect();
                    let mask = Mask::from_indices(model.length(layer, space), &indices).unwrap();
                    masks.push((LayerId(layer as u32), SPACES[space].to_owned(), mask));
                }
            }
            registry.end_task(TaskId(task), masks).unwrap();
            let hash = registry.content_hash(TaskId(task), &BTreeMap::new()).unwrap_or("0".repeat(64));
            registry.set_content_hash(TaskId(task), &hash).unwrap();
            model.open = None;
            model.tasks.insert(task, units);
        }
        Step::Abandon => {
            let Some(task) = model.open.take() else { return };
            registry.abandon_task(TaskId(task)).unwrap();
        }
        Step::Forget { task } => {
            if model.tasks.is_empty() {
                return;
            }
            let task = *model.tasks.keys().nth(task.index(model.tasks.len())).unwrap();
            let freed = registry.forget_task(TaskId(task)).unwrap();
            let units = model.tasks.remove(&task).unwrap();
            let wanted: Vec<_> = units.into_iter().filter(|unit| model.owner(unit).is_none()).collect();
            let freed: Vec<_> = freed
                .iter()
                .flat_map(|(layer, space, mask)| {
                    let space = SPACES.iter().position(|name| name == space).unwrap();
                    mask.iter().map(move |unit| (layer.0, space, unit))
                })
                .collect();
            assert_eq!(freed, wanted, "forgetting frees what no other task uses, in canonical order");
        }
        Step::Narrow { task, layer, space, start, count } => {
            if model.tasks.is_empty() || model.layers.is_empty() {
                return;
            }
            let task = *model.tasks.keys().nth(task.index(model.tasks.len())).unwrap();
            let (layer, space) = (layer.index(model.layers.len()), usize::from(*space));
            let length = model.length(layer, space);
            let start = start.index(length as usize) as u64;
            let kept: Vec<u64> = (start..length.min(start + count)).collect();
            let mask = Mask::from_indices(length, &kept).unwrap();
            registry.narrow_task(TaskId(task), vec![(LayerId(layer as u32), SPACES[space].to_owned(), mask)]).unwrap();
            let units = model.tasks.get_mut(&task).unwrap();
            units.retain(|unit| (unit.0 as usize, unit.1) != (layer, space) || kept.contains(&unit.2));
            let hash = registry.content_hash(TaskId(task), &BTreeMap::new()).unwrap_or("0".repeat(64));
            registry.set_content_hash(TaskId(task), &hash).unwrap();
        }
        Step::Reload => {
            let bytes = registry.to_bytes();
            let loaded = Registry::from_bytes(&bytes).unwrap();
            assert_eq!(loaded, *registry);
            assert_eq!(loaded.to_bytes(), bytes);
            *registry = loaded;
        }
    }
}

fn compare(registry: &Registry, model: &Model) {
    registry.validate().unwrap();
    let all: BTreeSet<_> = model.tasks.values().flatten().copied().collect();
    assert_eq!(registry.used_bytes().unwrap(), Model::bytes(&all));
    let total: u64 = (0..model.layers.len())
        .flat_map(|layer| (0..2).map(move |space| (layer, space)))
        .map(|(layer, space)| model.length(layer, space) * UNIT_BYTES[space])
        .sum();
    assert_eq!(registry.total_bytes(), total);
    for layer in 0..model.layers.len() {
        for (space, name) in SPACES.iter().enumerate() {
            let id = LayerId(layer as u32);
            let units = |keep: &dyn Fn(&(u32, usize, u64)) -> bool| -> Vec<u64> {
                (0..model.length(layer, space)).filter(|&unit| keep(&(layer as u32, space, unit))).collect()
            };
            let got = |mask: Mask| mask.iter().collect::<Vec<_>>();
            assert_eq!(got(registry.used(id, name).unwrap()), units(&|unit| all.contains(unit)));
            assert_eq!(got(registry.free(id, name).unwrap()), units(&|unit| !all.contains(unit)));
            let count = |unit: u64| {
                let uses = |units: &&BTreeSet<_>| units.contains(&(layer as u32, space, unit));
                model.tasks.values().filter(uses).count() as u32
            };
            let counts: Vec<u32> = (0..model.length(layer, space)).map(count).collect();
            assert_eq!(registry.reference_counts(id, name).unwrap(), counts);
            for (&task, used) in &model.tasks {
                let others = |unit: &_| model.tasks.iter().any(|(&other, units)| other != task && units.contains(unit));
                assert_eq!(got(registry.mask(TaskId(task), id, name).unwrap()), units(&|unit| used.contains(unit)));
                assert_eq!(
                    got(registry.owned(TaskId(task), id, name).unwrap()),
                    units(&|unit| used.contains(unit) && model.owner(unit) == Some(task))
                );
                assert_eq!(
                    got(registry.exclusive(TaskId(task), id, name).unwrap()),
                    units(&|unit| used.contains(unit) && !others(unit))
                );
            }
        }
    }
    let owned: BTreeMap<u32, Vec<u8>> =
        model.tasks.keys().map(|&task| (task, Model::values(&model.owned(task)))).collect();
    let given: BTreeMap<TaskId, &[u8]> = owned.iter().map(|(&task, values)| (TaskId(task), &values[..])).collect();
    let mut new_bytes = 0;
    for (&task, used) in &model.tasks {
        assert_eq!(registry.assemble(TaskId(task), &given).unwrap(), Model::values(used));
        new_bytes += registry.new_bytes(TaskId(task)).unwrap();
    }
    assert_eq!(new_bytes, registry.used_bytes().unwrap(), "every used unit has one owner");
    let live: Vec<u32> = registry.tasks().map(|task| task.id.0).collect();
    let none = BTreeSet::new();
    let of = |task: u32| model.tasks.get(&task).unwrap_or(&none);
    let row = |left: u32| live.iter().map(|&right| Model::bytes(of(left).intersection(of(right)))).collect();
    assert_eq!(registry.overlap().unwrap(), live.iter().map(|&left| row(left)).collect::<Vec<Vec<u64>>>());
}

/// Two layers, three tasks of which one is forgotten, one open.
fn sample() -> Registry {
    let mut registry = Registry::new();
    let spaces = || vec![Space { name: "components".to_owned(), units_per_expert: 8, unit_bytes: 100 }];
    let first = registry.add_layer("model.layers.0.mlp", 4, spaces()).unwrap();
    let second = registry.add_layer("model.layers.1.mlp", 2, spaces()).unwrap();
    registry.add_experts(first, 1).unwrap();
    let mask = |length, indices: &[u64]| Mask::from_indices(length, indices).unwrap();
    for (name, units) in [("one", [1_u64, 2, 3]), ("two", [3, 4, 5]), ("three", [5, 6, 7])] {
        let task = registry.begin_task(name, None).unwrap();
        let masks = vec![
            (first, "components".to_owned(), mask(40, &units)),
            (second, "components".to_owned(), mask(16, &units)),
        ];
        registry.end_task(task, masks).unwrap();
    }
    registry.set_content_hash(TaskId(2), &"5a".repeat(32)).unwrap();
    registry.forget_task(TaskId(0)).unwrap();
    registry.begin_task("four", Some("a domain")).unwrap();
    registry
}

/// Puts the right checksum on bytes, as an attacker would.
fn sealed(mut bytes: Vec<u8>) -> Vec<u8> {
    let end = bytes.len() - 32;
    let hash = blake3::hash(&bytes[..end]);
    bytes[end..].copy_from_slice(hash.as_bytes());
    bytes
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 96, ..ProptestConfig::default() })]

    #[test]
    fn the_ledger_does_what_the_model_does(steps in prop::collection::vec(any_step(), 1..30)) {
        let (mut registry, mut model) = (Registry::new(), Model::default());
        apply(&Step::AddLayer { units: 8, experts: 2 }, &mut registry, &mut model);
        for step in &steps {
            apply(step, &mut registry, &mut model);
            compare(&registry, &model);
        }
    }

    #[test]
    fn every_flipped_bit_is_found(position in any::<prop::sample::Index>(), bit in 0..8) {
        let mut bytes = sample().to_bytes();
        let at = position.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        let code = Registry::from_bytes(&bytes).unwrap_err().code();
        prop_assert!(["format_magic", "format_version", "format_checksum"].contains(&code), "{}", code);
    }

    #[test]
    fn changes_under_a_right_checksum_never_panic(
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in any::<prop::sample::Index>(),
        cuts in any::<bool>(),
    ) {
        let mut bytes = sample().to_bytes();
        for (position, value) in changes {
            let at = 10 + position.index(bytes.len() - 42);
            bytes[at] = value;
        }
        if cuts {
            bytes.drain(cut.index(bytes.len() - 32)..bytes.len() - 32);
        }
        if let Ok(registry) = Registry::from_bytes(&sealed(bytes)) {
            registry.validate().unwrap();
            prop_assert_eq!(Registry::from_bytes(&registry.to_bytes()).unwrap(), registry);
        }
    }
}

#[test]
fn every_cut_is_found() {
    let bytes = sample().to_bytes();
    for length in 0..bytes.len() {
        let code = Registry::from_bytes(&bytes[..length]).unwrap_err().code();
        assert!(["format_truncated", "format_checksum"].contains(&code), "{code} at {length}");
    }
}

#[test]
fn huge_declarations_are_refused_before_they_cost_anything() {
    // Ten layers of all experts that may ever be: the second names experts of the first.
    let mut layers = vec![10];
    crate::wire::put_varint(&mut layers, 1 << 20);
    layers.push(10);
    for _ in 0..10 {
        layers.extend([0, 0, 0, 1, b'a', 1, 0]);
        crate::wire::put_varint(&mut layers, (1 << 20) - 1);
        layers.extend([1, 0, 0, 1, b's', 1, 1]);
    }
    let mut bytes = b"MOSESREG\x01\x00\x01".to_vec();
    bytes.extend((layers.len() as u64).to_le_bytes());
    bytes.extend(layers);
    bytes.extend([0; 32]);
    assert_eq!(Registry::from_bytes(&sealed(bytes)).unwrap_err().code(), "format_malformed");

    let mut bytes = b"MOSESREG\x01\x00\x01".to_vec();
    bytes.extend(u64::MAX.to_le_bytes());
    bytes.extend([0; 32]);
    assert_eq!(Registry::from_bytes(&sealed(bytes)).unwrap_err().code(), "format_oversized");
}

#[test]
fn a_failed_end_changes_nothing() {
    let mut registry = sample();
    let before = registry.clone();
    let mask = |length| Mask::full(length).unwrap();
    let open = TaskId(3);
    let space = || "components".to_owned();
    for (masks, code) in [
        (vec![(LayerId(0), space(), mask(40)), (LayerId(1), space(), mask(17))], "mask_misfit"),
        (vec![(LayerId(0), space(), mask(40)), (LayerId(0), space(), mask(40))], "mask_given_twice"),
        (vec![(LayerId(0), space(), mask(40)), (LayerId(9), space(), mask(40))], "layer_unknown"),
        (vec![(LayerId(0), "B".to_owned(), mask(40))], "space_unknown"),
    ] {
        assert_eq!(registry.end_task(open, masks).unwrap_err().code(), code);
        assert_eq!(registry, before);
    }
    assert_eq!(registry.end_task(TaskId(1), Vec::new()).unwrap_err().code(), "task_ended");
    assert_eq!(registry.end_task(TaskId(0), Vec::new()).unwrap_err().code(), "task_unknown");
}

#[test]
fn a_names_only_task_costs_next_to_nothing() {
    let mut registry = Registry::new();
    for layer in 0..24 {
        let space = Space { name: "components".to_owned(), units_per_expert: 8, unit_bytes: 1000 };
        registry.add_layer(&format!("model.layers.{layer}.self_attn.q_proj"), 4, vec![space]).unwrap();
    }
    let empty = registry.to_bytes().len();
    assert!(empty < 24 * 20 + 100, "{empty}: layers of like names are stored by their difference");
    let task = registry.begin_task("a", None).unwrap();
    let masks =
        (0..24).map(|layer| (LayerId(layer), "components".to_owned(), Mask::from_indices(32, &[1, 5, 30]).unwrap()));
    registry.end_task(task, masks.collect()).unwrap();
    let bytes = registry.mask_bytes(task).unwrap();
    assert!(bytes < 24 * 10, "{bytes}");
    assert!((registry.to_bytes().len() - empty) as u64 - bytes < 16, "the masks are all that a task costs");
}
