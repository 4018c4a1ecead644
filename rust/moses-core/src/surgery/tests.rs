//! Small checkpoints of real files: every operation that fails, and every point at which the machine may stop.
#![allow(clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use proptest::prelude::*;

use super::*;
use crate::Error;
use crate::checkpoint::Checkpoint;
use crate::layout::Layout;

const LAYERS: usize = 2;
const EXPERTS: usize = 4;

/// A safetensors file: names, shapes, and bytes that are the hash of the name.
fn shard(tensors: &[(String, Vec<u64>)]) -> Vec<u8> {
    let mut header = String::from("{\"__metadata__\":{\"format\":\"pt\"}");
    let mut data = Vec::new();
    for (name, shape) in tensors {
        let count = shape.iter().product::<u64>() as usize;
        let begin = data.len();
        let mut bits = name.bytes().fold(7_u32, |sum, byte| sum.wrapping_mul(31).wrapping_add(u32::from(byte)));
        for _ in 0..count {
            bits = bits.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            data.extend((((bits >> 8) as f32) / 8_388_608.0 - 1.0).to_le_bytes());
        }
        header +=
            &format!(",{name:?}:{{\"dtype\":\"F32\",\"shape\":{shape:?},\"data_offsets\":[{begin},{}]}}", data.len());
    }
    header.push('}');
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.into_bytes());
    bytes.extend(data);
    bytes
}

fn config(experts: usize) -> String {
    format!(
        "{{\"architectures\":[\"MixtralForCausalLM\"],\"model_type\":\"mixtral\",\"num_local_experts\":{experts},\"num_experts_per_tok\":2,\"rms_norm_eps\":1e-05}}"
    )
}

/// A Mixtral of two layers and four experts in two shards.
fn write(folder: &Path, layout: Layout) -> PathBuf {
    std::fs::create_dir(folder).unwrap();
    let mut shards: Vec<Vec<(String, Vec<u64>)>> = vec![vec![("model.embed_tokens.weight".to_owned(), vec![8, 4])]];
    for layer in 0..LAYERS {
        let block = format!("model.layers.{layer}");
        let mut tensors = vec![(format!("{block}.self_attn.q_proj.weight"), vec![4, 4])];
        if layout == Layout::Fused {
            tensors.push((format!("{block}.mlp.gate.weight"), vec![EXPERTS as u64, 4]));
            tensors.push((format!("{block}.mlp.experts.gate_up_proj"), vec![EXPERTS as u64, 6, 4]));
            tensors.push((format!("{block}.mlp.experts.down_proj"), vec![EXPERTS as u64, 4, 3]));
        } else {
            tensors.push((format!("{block}.block_sparse_moe.gate.weight"), vec![EXPERTS as u64, 4]));
            for expert in 0..EXPERTS {
                for (name, shape) in [("w1", vec![3, 4]), ("w2", vec![4, 3]), ("w3", vec![3, 4])] {
                    tensors.push((format!("{block}.block_sparse_moe.experts.{expert}.{name}.weight"), shape));
                }
            }
        }
        shards.push(tensors);
    }
    let first = shards.remove(0);
    shards[0].extend(first);
    let mut map = BTreeMap::new();
    for (number, tensors) in shards.iter().enumerate() {
        let name = format!("model-{:05}-of-00002.safetensors", number + 1);
        std::fs::write(folder.join(&name), shard(tensors)).unwrap();
        map.extend(tensors.iter().map(|(tensor, _)| (tensor.clone(), name.clone())));
    }
    let index = serde_json::json!({"metadata": {"total_size": 1}, "weight_map": map});
    std::fs::write(folder.join("model.safetensors.index.json"), index.to_string()).unwrap();
    std::fs::write(folder.join("config.json"), config(EXPERTS)).unwrap();
    std::fs::write(folder.join("tokenizer.json"), "{}").unwrap();
    std::fs::create_dir(folder.join("original")).unwrap();
    std::fs::write(folder.join("original/notes.txt"), "mine").unwrap();
    folder.to_owned()
}

/// The same slots in every layer, of as many experts as are written.
fn request(slots: &[SlotRequest]) -> Request {
    request_of(EXPERTS, slots)
}

/// The same slots in every layer, of `before` experts.
fn request_of(before: usize, slots: &[SlotRequest]) -> Request {
    let layer = |number: usize| {
        serde_json::json!({
            "layer": format!("model.layers.{number}"), "before": before, "dense": false,
            "slots": slots.iter().map(|slot| serde_json::json!({
                "sources": slot.sources, "weights": slot.weights, "new": slot.new, "noise": slot.noise,
            })).collect::<Vec<_>>(),
        })
    };
    let layers: Vec<_> = (0..LAYERS).map(layer).collect();
    let plan = serde_json::json!({"format_version": 1, "layers": layers, "top_k": null, "new_rows": "copy", "seed": 3});
    Request::parse(plan.to_string().as_bytes()).unwrap()
}

fn keep(experts: &[u64]) -> Vec<SlotRequest> {
    experts.iter().map(|&expert| SlotRequest::keep(expert)).collect()
}

fn grown() -> Vec<SlotRequest> {
    let mut slots = keep(&[0, 1, 2, 3]);
    slots.push(SlotRequest { new: true, noise: 0.1, ..SlotRequest::keep(1) });
    slots
}

/// All files below a folder, links followed, and their content.
fn content(folder: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut found = BTreeMap::new();
    for entry in std::fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = entry.file_name().into_string().unwrap();
        if entry.path().is_dir() {
            found.extend(content(&entry.path()).into_iter().map(|(inner, bytes)| (format!("{name}/{inner}"), bytes)));
        } else {
            found.insert(name, std::fs::read(entry.path()).unwrap());
        }
    }
    found
}

fn names(folder: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[derive(Clone, Copy, PartialEq)]
enum Mode {
    /// Operation `n` fails, those after it work.
    Fail,
    /// Operation `n` and all after it fail: the process was killed.
    Stop,
}

/// The machine's disk, at which one operation fails.
struct Faulty {
    real: RealDisk,
    at: u64,
    mode: Mode,
    count: AtomicU64,
}

impl Faulty {
    fn new(at: u64, mode: Mode) -> Self {
        Self { real: RealDisk::default(), at, mode, count: AtomicU64::new(0) }
    }

    fn step(&self) -> io::Result<()> {
        let now = self.count.fetch_add(1, Ordering::SeqCst);
        let fails = if self.mode == Mode::Fail { now == self.at } else { now >= self.at };
        if fails { Err(io::Error::other("injected fault")) } else { Ok(()) }
    }
}

impl Disk for Faulty {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        self.step()?;
        self.real.create_folder(path)
    }
    fn create_file(&self, path: &Path) -> io::Result<File> {
        self.step()?;
        self.real.create_file(path)
    }
    fn copy(&self, from: &File, from_at: u64, to: &File, to_at: u64, len: u64) -> io::Result<()> {
        if let Err(error) = self.step() {
            // A copy that is stopped may have moved a part.
            self.real.copy(from, from_at, to, to_at, len / 2)?;
            return Err(error);
        }
        self.real.copy(from, from_at, to, to_at, len)
    }
    fn write_at(&self, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        if let Err(error) = self.step() {
            self.real.write_at(file, &bytes[..bytes.len() / 2], at)?;
            return Err(error);
        }
        self.real.write_at(file, bytes, at)
    }
    fn sync(&self, _: &File) -> io::Result<()> {
        self.step()
    }
    fn sync_folder(&self, _: &Path) -> io::Result<()> {
        self.step()
    }
    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        self.real.link(from, to)
    }
    fn symlink(&self, content: &Path, at: &Path) -> io::Result<()> {
        self.step()?;
        self.real.symlink(content, at)
    }
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.step()?;
        self.real.rename_new(from, to)
    }
    fn exchange(&self, left: &Path, right: &Path) -> io::Result<()> {
        self.step()?;
        self.real.exchange(left, right)
    }
    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        if let Err(error) = self.step() {
            // Half removed.
            if let Some(name) = names(path).first().filter(|name| path.join(name).is_file()) {
                std::fs::remove_file(path.join(name))?;
            }
            return Err(error);
        }
        self.real.remove_tree(path)
    }
}

fn target(path: PathBuf) -> Target {
    Target { threads: 1, ..Target::new(path) }
}

fn run(disk: &dyn Disk, source: &Path, out: &Path, slots: &[SlotRequest], in_place: bool) -> crate::Result<Done> {
    let opened = Checkpoint::open(source)?;
    let options = Options { in_place, operation: "test".to_owned(), ..Options::default() };
    execute(disk, &build(&[&opened], &request(slots), &options)?, &target(out.to_owned()), &|_, _| true)
}

#[test]
fn whatever_fails_leaves_nothing_and_whenever_it_stops_leaves_all_or_nothing() {
    let mut points = 0;
    for (layout, slots) in
        [(Layout::PerExpert, keep(&[3, 1])), (Layout::Fused, keep(&[0, 2])), (Layout::PerExpert, grown())]
    {
        let folder = tempfile::tempdir().unwrap();
        let source = write(&folder.path().join("source"), layout);
        let out = folder.path().join("out");
        let before = content(&source);
        let counter = Faulty::new(u64::MAX, Mode::Fail);
        run(&counter, &source, &out, &slots, false).unwrap();
        let whole = content(&out);
        let total = counter.count.load(Ordering::SeqCst);
        std::fs::remove_dir_all(&out).unwrap();
        for mode in [Mode::Fail, Mode::Stop] {
            for at in 0..total {
                points += 1;
                let done = run(&Faulty::new(at, mode), &source, &out, &slots, false);
                // The last operation syncs the folder of an output that is in place already.
                assert_eq!(at + 1 == total, out.exists(), "operation {at} of {total}");
                assert!(done.is_err());
                if out.exists() {
                    assert_eq!(content(&out), whole);
                    std::fs::remove_dir_all(&out).unwrap();
                } else if mode == Mode::Fail {
                    assert_eq!(names(folder.path()), ["source"], "operation {at} of {total} left something");
                }
                assert_eq!(content(&source), before);
                // What a stopped run left does not disturb the next.
                run(&RealDisk::default(), &source, &out, &slots, false).unwrap();
                assert_eq!(content(&out), whole);
                assert_eq!(names(folder.path()), ["out", "source"]);
                std::fs::remove_dir_all(&out).unwrap();
            }
        }
    }
    assert!(points >= 200, "{points} points");
}

#[test]
fn in_place_the_folder_is_the_old_or_the_new_at_every_point() {
    for layout in [Layout::PerExpert, Layout::Fused] {
        let start = || {
            let folder = tempfile::tempdir().unwrap();
            let source = write(&folder.path().join("model"), layout);
            (folder, source)
        };
        let (_folder, source) = start();
        let old = content(&source);
        let counter = Faulty::new(u64::MAX, Mode::Fail);
        run(&counter, &source, &source, &grown(), true).unwrap();
        let new = content(&source);
        assert_eq!(new["original/notes.txt"], b"mine");
        assert_eq!(new["tokenizer.json"], old["tokenizer.json"]);
        let total = counter.count.load(Ordering::SeqCst);
        let (mut olds, mut news) = (0, 0);
        for mode in [Mode::Fail, Mode::Stop] {
            for at in 0..total {
                let (folder, source) = start();
                let _ = run(&Faulty::new(at, mode), &source, &source, &grown(), true);
                let now = content(&source);
                assert!(now == old || now == new, "operation {at} of {total}: a mix");
                if now == old {
                    olds += 1;
                    if mode == Mode::Fail {
                        assert_eq!(names(folder.path()), ["model"]);
                    }
                    run(&RealDisk::default(), &source, &source, &grown(), true).unwrap();
                    assert_eq!(content(&source), new);
                } else {
                    news += 1;
                }
            }
        }
        assert!(olds > 20 && news >= 2, "{olds} {news}");
    }
}

#[test]
fn growth_in_place_leaves_untouched_shards_as_they_are() {
    use std::os::unix::fs::MetadataExt as _;
    let folder = tempfile::tempdir().unwrap();
    let source = write(&folder.path().join("model"), Layout::PerExpert);
    let inode = |name: &str| std::fs::metadata(source.join(name)).unwrap().ino();
    let before = inode("model-00001-of-00002.safetensors");
    let opened = Checkpoint::open(&source).unwrap();
    let whole: u64 = opened.shards.iter().map(|shard| shard.file.bytes).sum();
    let done = run(&RealDisk::default(), &source, &source, &grown(), true).unwrap();
    assert!(done.bytes_written < whole / 2, "{} of {whole}", done.bytes_written);
    let after = Checkpoint::open(&source).unwrap();
    assert_eq!(after.superseded.len(), LAYERS, "the gates before");
    assert_eq!(after.layers[0].num_experts(), 5);
    assert!(before == inode("model-00001-of-00002.safetensors"), "the shard was written again");
    assert!(after.tensor("model.layers.0.block_sparse_moe.experts.4.w1.weight").is_some());
    // Growing again supersedes again, in a shard that sorts later.
    let slots = [keep(&[0, 1, 2, 3, 4]), vec![SlotRequest { new: true, ..SlotRequest::keep(0) }]].concat();
    let opened = Checkpoint::open(&source).unwrap();
    let again = request_of(5, &slots);
    let options = Options { in_place: true, ..Options::default() };
    let job = build(&[&opened], &again, &options).unwrap();
    execute(&RealDisk::default(), &job, &target(source.clone()), &|_, _| true).unwrap();
    let last = Checkpoint::open(&source).unwrap();
    assert_eq!(last.layers[1].num_experts(), 6);
    // Written to another folder, nothing stale is left.
    let out = folder.path().join("clean");
    let job = build(
        &[&last],
        &{
            let mut same = request(&keep(&[0]));
            same.layers.clear();
            same
        },
        &Options::default(),
    )
    .unwrap();
    execute(&RealDisk::default(), &job, &target(out.clone()), &|_, _| true).unwrap();
    assert!(Checkpoint::open(&out).unwrap().superseded.is_empty());
}

#[test]
fn a_second_process_waits_and_a_stopped_one_is_cleared() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(&folder.path().join("source"), Layout::PerExpert);
    let out = folder.path().join("out");
    let busy = folder.path().join(".out.moses-surgery");
    std::fs::create_dir(&busy).unwrap();
    let held = super::disk::lock(&busy).unwrap().unwrap();
    let error = run(&RealDisk::default(), &source, &out, &keep(&[0, 1]), false).unwrap_err();
    assert_eq!(error.code(), "surgery_busy");
    drop(held);
    run(&RealDisk::default(), &source, &out, &keep(&[0, 1]), false).unwrap();
    assert_eq!(names(folder.path()), ["out", "source"]);
}

#[test]
fn stopping_leaves_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(&folder.path().join("source"), Layout::Fused);
    let opened = Checkpoint::open(&source).unwrap();
    let job = build(&[&opened], &request(&keep(&[0, 1])), &Options::default()).unwrap();
    let error = execute(&RealDisk::default(), &job, &target(folder.path().join("out")), &|_, _| false).unwrap_err();
    assert_eq!(error.code(), "cancelled");
    assert_eq!(names(folder.path()), ["source"]);
}

#[test]
fn a_source_that_changes_after_the_plan_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(&folder.path().join("source"), Layout::Fused);
    let opened = Checkpoint::open(&source).unwrap();
    let job = build(&[&opened], &request(&keep(&[0, 1])), &Options::default()).unwrap();
    let name = source.join("model-00002-of-00002.safetensors");
    let mut bytes = std::fs::read(&name).unwrap();
    bytes.push(0);
    std::fs::write(&name, bytes).unwrap();
    let error = execute(&RealDisk::default(), &job, &target(folder.path().join("out")), &|_, _| true).unwrap_err();
    assert_eq!(error.code(), "source_changed");
    assert_eq!(names(folder.path()), ["source"]);
}

#[test]
fn a_wrong_byte_row_or_expert_is_found() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(&folder.path().join("source"), Layout::Fused);
    let out = folder.path().join("out");
    run(&RealDisk::default(), &source, &out, &keep(&[3, 1]), false).unwrap();
    let opened = Checkpoint::open(&source).unwrap();
    let plan = request(&keep(&[3, 1]));
    let found = compare(&Checkpoint::open(&out).unwrap(), &[&opened], &plan).unwrap();
    assert_eq!((found.tensors, found.experts, found.rows, found.new), (3, 4, 4, 0));
    assert!(found.problems.is_empty());
    let other = request(&keep(&[1, 3]));
    let found = compare(&Checkpoint::open(&out).unwrap(), &[&opened], &other).unwrap();
    assert_eq!((found.experts, found.rows, found.problems.len()), (0, 0, 8));
    for name in ["model.layers.1.mlp.gate.weight", "model.layers.0.mlp.experts.down_proj", "model.embed_tokens.weight"]
    {
        let checked = Checkpoint::open(&out).unwrap();
        let region = checked.tensor(name).unwrap().region;
        let path = checked.shards[region.shard as usize].file.path.clone();
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[region.offset as usize + 1] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
        let found = compare(&Checkpoint::open(&out).unwrap(), &[&opened], &plan).unwrap();
        assert_eq!(found.problems.len(), 1, "{name}: {found:?}");
        bytes[region.offset as usize + 1] ^= 1;
        std::fs::write(&path, &bytes).unwrap();
    }
}

#[test]
fn buffered_copies_are_the_same_as_the_kernels() {
    let folder = tempfile::tempdir().unwrap();
    let bytes: Vec<u8> = (0..3_000_000_u32).map(|value| (value.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let path = folder.path().join("a");
    std::fs::write(&path, &bytes).unwrap();
    let from = File::open(&path).unwrap();
    for (name, disk) in [("b", RealDisk::default()), ("c", RealDisk::buffered())] {
        let to = disk.create_file(&folder.path().join(name)).unwrap();
        disk.copy(&from, 5, &to, 3, 2_500_000).unwrap();
        assert_eq!(std::fs::read(folder.path().join(name)).unwrap()[3..], bytes[5..2_500_005]);
        assert_eq!(disk.copy(&from, 2_999_990, &to, 0, 11).unwrap_err().kind(), io::ErrorKind::UnexpectedEof);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    /// Whatever is kept, in whatever order and layout: it comes out, each row with its expert.
    #[test]
    fn any_choice_comes_out_as_it_went_in(
        order in Just(vec![0_u64, 1, 2, 3]).prop_shuffle(),
        count in 2_usize..=4,
        fused in any::<bool>(),
        to_fused in any::<bool>(),
    ) {
        let of = |fused| if fused { Layout::Fused } else { Layout::PerExpert };
        let folder = tempfile::tempdir().unwrap();
        let source = write(&folder.path().join("source"), of(fused));
        let out = folder.path().join("out");
        let plan = request(&keep(&order[..count]));
        let opened = Checkpoint::open(&source).unwrap();
        let options = Options { layout: Some(of(to_fused)), ..Options::default() };
        let job = build(&[&opened], &plan, &options).unwrap();
        execute(&RealDisk::default(), &job, &target(out.clone()), &|_, _| true).unwrap();
        let found = Checkpoint::open(&out).unwrap();
        prop_assert_eq!(found.layers[0].layout, of(to_fused));
        let compared = compare(&found, &[&opened], &plan).unwrap();
        prop_assert!(compared.problems.is_empty(), "{:?}", compared);
        prop_assert_eq!(compared.experts, 2 * count as u64);
    }

    /// No index, config or plan brings the process down.
    #[test]
    fn damaged_files_are_errors(which in 0_usize..4, place in any::<prop::sample::Index>(), bit in 0..8) {
        let folder = tempfile::tempdir().unwrap();
        let source = write(&folder.path().join("source"), Layout::PerExpert);
        let name = ["config.json", "model.safetensors.index.json", "model-00001-of-00002.safetensors", "plan"][which];
        if name == "plan" {
            let mut text = br#"{"format_version":1,"layers":[{"layer":"model.layers.0","before":4,"slots":[{"sources":[1],"weights":[],"new":false,"noise":0.0}],"dense":false}],"top_k":1,"new_rows":"copy","seed":0}"#.to_vec();
            let at = place.index(text.len());
            text[at] ^= 1_u8 << bit;
            if let Ok(plan) = Request::parse(&text) {
                let opened = Checkpoint::open(&source).unwrap();
                let _ = build(&[&opened], &plan, &Options { uneven: true, ..Options::default() });
            }
            return Ok(());
        }
        let path = source.join(name);
        let mut bytes = std::fs::read(&path).unwrap();
        let length = bytes.len().min(3000);
        let at = place.index(length);
        bytes[at] ^= 1_u8 << bit;
        std::fs::write(&path, bytes).unwrap();
        if let Ok(opened) = Checkpoint::open(&source) {
            let _ = build(&[&opened], &request(&keep(&[0, 1])), &Options::default());
        }
    }
}

#[test]
fn too_little_room_is_an_error_before_anything_is_written() {
    let folder = tempfile::tempdir().unwrap();
    let source = write(&folder.path().join("source"), Layout::PerExpert);
    let opened = Checkpoint::open(&source).unwrap();
    let mut job = build(&[&opened], &request(&keep(&[0, 1])), &Options::default()).unwrap();
    job.shards[0].bytes = u64::MAX / 2;
    let error = execute(&RealDisk::default(), &job, &target(folder.path().join("out")), &|_, _| true).unwrap_err();
    assert!(matches!(error, Error::NoSpace { .. }), "{error}");
    assert_eq!(names(folder.path()), ["source"]);
}
