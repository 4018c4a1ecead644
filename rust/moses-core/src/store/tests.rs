//! Every crash, everywhere: a sequence of commits is cut at each operation, the machine loses what was not synced in
//! several ways, and what is found after must be one of the states that were, and the right one.
#![allow(clippy::arithmetic_side_effects)]

use std::collections::BTreeMap;

use proptest::prelude::*;

use super::{MANIFEST, PENDING, Store, TEMPORARY};
use crate::vfs::FileSystem;
use crate::vfs::memory::{Fault, MemoryFs, Survival};
use crate::{Error, Result};

type Content = BTreeMap<String, Vec<u8>>;
type Commit = (Vec<(&'static str, &'static str)>, Vec<&'static str>);

fn script() -> Vec<Commit> {
    vec![
        (vec![("config.json", "{1}"), ("registry.moses", "first registry")], vec![]),
        (
            vec![("tasks/000-fomc/adapter.safetensors", "weights of fomc"), ("registry.moses", "second registry")],
            vec![],
        ),
        (
            vec![("tasks/001-py150/adapter.safetensors", "weights"), ("registry.moses", "third"), ("a/b/c", "")],
            vec!["config.json"],
        ),
        (
            vec![("tasks/001-py150/adapter.safetensors", "moved weights"), ("registry.moses", "4")],
            vec!["tasks/000-fomc/adapter.safetensors"],
        ),
        (vec![("registry.moses", "fifth registry")], vec!["a/b/c"]),
    ]
}

fn commit(store: &mut Store<&MemoryFs>, (put, delete): &Commit) -> Result<u64> {
    let put = put.iter().map(|(name, content)| ((*name).to_owned(), content.as_bytes())).collect();
    store.commit(&put, &delete.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>())
}

/// What the files are after the first `count` commits.
fn expected(count: usize) -> Content {
    let mut content = Content::new();
    for (put, delete) in &script()[..count] {
        delete.iter().for_each(|name| drop(content.remove(*name)));
        content.extend(put.iter().map(|(name, text)| ((*name).to_owned(), text.as_bytes().to_vec())));
    }
    content
}

fn content<F: FileSystem>(store: &Store<F>) -> Content {
    store.files().keys().map(|name| (name.clone(), store.read(name).unwrap())).collect()
}

fn open(files: &MemoryFs, write: bool) -> Result<Store<&MemoryFs>> {
    Store::open(files, write)
}

/// What a writer finds must be whole, of a generation that is allowed, and free of leftovers.
fn check(files: &MemoryFs, allowed: std::ops::RangeInclusive<u64>, what: &str) -> u64 {
    let reader = open(files, false).unwrap_or_else(|error| panic!("{what}: a reader finds: {error}"));
    let generation = reader.generation();
    assert!(allowed.contains(&generation), "{what}: generation {generation} where {allowed:?} may be");
    assert_eq!(content(&reader), expected(generation as usize), "{what}: a reader sees a mix");
    let store = open(files, true).unwrap_or_else(|error| panic!("{what}: a writer finds: {error}"));
    assert_eq!((store.generation(), content(&store)), (generation, expected(generation as usize)), "{what}");
    assert_eq!(store.verify().unwrap(), [], "{what}");
    let mut wanted: Vec<String> = store.files().values().map(|info| info.path.clone()).collect();
    wanted.push(MANIFEST.to_owned());
    wanted.sort();
    let found: Vec<String> = files.tree().into_keys().filter(|path| !path.ends_with('/')).collect();
    assert_eq!(found, wanted, "{what}: leftovers");
    generation
}

/// Runs the script with this fault; the number of commits that were confirmed, and the number that began.
fn run(files: &MemoryFs, fault: Fault) -> (u64, u64) {
    files.set_fault(fault);
    let Ok(mut store) = Store::create(files) else { return (0, 0) };
    let (mut confirmed, mut begun) = (0, 0);
    for (at, step) in script().iter().enumerate() {
        begun = at as u64 + 1;
        match commit(&mut store, step) {
            Ok(generation) => {
                assert_eq!(generation, begun);
                confirmed = begun;
            }
            Err(_) => break,
        }
    }
    (confirmed, begun)
}

fn operations() -> u64 {
    let files = MemoryFs::default();
    assert_eq!(run(&files, Fault::None), (5, 5));
    files.operations()
}

fn survivals() -> impl Iterator<Item = Survival> {
    [Survival::Nothing, Survival::Everything].into_iter().chain((1..24).map(|seed| Survival::Chance(seed * 7919)))
}

#[test]
fn a_crash_at_any_operation_leaves_the_old_state_or_the_new() {
    for cut in 0..operations() {
        for survival in survivals() {
            let files = MemoryFs::default();
            let (confirmed, begun) = run(&files, Fault::StopAt(cut));
            let found = files.after_crash(survival);
            let what = format!("cut at {cut}, {survival:?}");
            match open(&found, false) {
                // Only before the run was made.
                Err(Error::NotARun { .. }) => assert_eq!(begun, 0, "{what}: the run is lost"),
                _ => {
                    check(&found, confirmed..=begun, &what);
                }
            }
        }
    }
}

#[test]
fn a_second_crash_while_the_first_is_mended_does_no_harm() {
    for cut in 0..operations() {
        for (first, second) in survivals().zip(survivals().skip(1)).take(8) {
            let files = MemoryFs::default();
            let (confirmed, begun) = run(&files, Fault::StopAt(cut));
            let found = files.after_crash(first);
            let Ok(reader) = open(&found, false) else { continue };
            let generation = reader.generation();
            for cut_again in 0..12 {
                let again = found.after_crash(Survival::Everything);
                again.set_fault(Fault::StopAt(cut_again));
                drop(open(&again, true));
                let what = format!("cut at {cut}, {first:?}, then at {cut_again}, {second:?}");
                let found = check(&again.after_crash(second), confirmed..=begun, &what);
                assert_eq!(found, generation, "{what}: what a reader saw must not go back");
            }
        }
    }
}

#[test]
fn a_power_cut_while_the_next_process_mends_does_no_harm() {
    for cut in 0..operations() {
        for cut_again in 0..12 {
            // The process dies, the machine does not: what was not synced is there, and not yet safe.
            let files = MemoryFs::default();
            let (confirmed, begun) = run(&files, Fault::StopAt(cut));
            files.set_fault(Fault::StopAt(cut_again));
            if let Err(Error::NotARun { .. }) = open(&files, true) {
                continue;
            }
            for survival in survivals().take(8) {
                let found = files.after_crash(survival);
                let what = format!("killed at {cut}, power cut at {cut_again}, {survival:?}");
                match open(&found, false) {
                    Err(Error::NotARun { .. }) => assert_eq!(begun, 0, "{what}: the run is lost"),
                    _ => {
                        check(&found, confirmed..=begun, &what);
                    }
                }
            }
        }
    }
}

#[test]
fn after_an_io_error_anywhere_the_state_is_the_one_that_was_told() {
    for at in 0..operations() {
        let files = MemoryFs::default();
        files.set_fault(Fault::FailAt(at));
        let Ok(mut store) = Store::create(&files) else { continue };
        for step in script() {
            let before = store.generation();
            match commit(&mut store, &step) {
                Ok(generation) => assert_eq!(generation, before + 1),
                Err(Error::NotDurable { generation, .. }) => {
                    assert_eq!((generation, store.generation()), (before + 1, before + 1));
                    // The power goes: the old state or the new, as told.
                    for survival in survivals() {
                        check(
                            &files.after_crash(survival),
                            before..=before + 1,
                            &format!("error at {at}, {survival:?}"),
                        );
                    }
                }
                Err(error) => {
                    assert_eq!(error.code(), "io", "{error}");
                    assert_eq!(store.generation(), before, "error at {at}");
                    assert_eq!(content(&store), expected(before as usize), "error at {at}");
                    assert_eq!(commit(&mut store, &step).unwrap(), before + 1, "a second try works");
                }
            }
            assert_eq!(content(&store), expected(store.generation() as usize), "error at {at}");
        }
        assert_eq!(store.generation(), 5);
        drop(store);
        check(&files, 5..=5, &format!("error at {at}"));
    }
}

#[test]
fn a_disk_that_dies_at_the_commit_point_is_told_as_such() {
    let mut codes = std::collections::BTreeSet::new();
    for cut in 0..operations() {
        let files = MemoryFs::default();
        let Ok(mut store) = Store::create(&files) else { continue };
        files.set_fault(Fault::StopAt(cut));
        for step in script() {
            let Err(error) = commit(&mut store, &step) else { continue };
            codes.insert(error.code());
            if error.code() == "commit_unknown" {
                assert_eq!(commit(&mut store, &step).unwrap_err().code(), "store_closed");
            }
        }
    }
    assert!(codes.is_superset(&["commit_unknown", "commit_not_durable"].into()), "{codes:?}");
}

#[test]
fn what_was_recovered_is_said() {
    let files = MemoryFs::default();
    run(&files, Fault::None);
    let count = files.operations();
    let mut said = std::collections::BTreeSet::new();
    for cut in 0..count {
        let files = MemoryFs::default();
        run(&files, Fault::StopAt(cut));
        let found = files.after_crash(Survival::Everything);
        let Ok(store) = open(&found, true) else { continue };
        if let Some(sentence) = store.recovered() {
            assert!(sentence.contains(&format!("generation {}", store.generation())), "{sentence}");
            said.insert(sentence.split_whitespace().take(4).collect::<Vec<_>>().join(" "));
        }
    }
    let said: Vec<String> = said.into_iter().collect();
    assert_eq!(said, ["an unfinished commit was", "the commit of generation"]);
    assert_eq!(open(&files, true).unwrap().recovered(), None);
}

#[test]
fn files_that_no_commit_wrote_are_left_alone() {
    let files = MemoryFs::default();
    let put = |path: &str| files.create_file(path).unwrap().write_all(b"mine").unwrap();
    put("results.json");
    put("registry.moses");
    let mut store = Store::create(&files).unwrap();
    for step in script() {
        commit(&mut store, &step).unwrap();
    }
    assert_eq!(files.tree()["results.json"], b"mine");
    assert_eq!(files.tree()["registry.moses"], b"mine");
    assert_eq!(store.read("registry.moses").unwrap(), b"fifth registry");
}

#[test]
fn a_live_file_is_never_written_over() {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    let mut paths = Vec::new();
    for text in ["a", "b", "c"] {
        let before = store.files().get("x/w.bin").map(|info| info.path.clone());
        commit(&mut store, &(vec![("x/w.bin", text)], vec![])).unwrap();
        let path = store.files()["x/w.bin"].path.clone();
        assert_ne!(Some(&path), before.as_ref());
        paths.push(path);
    }
    assert_eq!(paths, ["x/w.bin", "x/w.g2.bin", "x/w.bin"]);
}

#[test]
fn a_reader_that_is_overtaken_is_told_so() {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    commit(&mut store, &script()[0]).unwrap();
    let reader = open(&files, false).unwrap();
    assert_eq!(reader.read("config.json").unwrap(), b"{1}");
    commit(&mut store, &(vec![("config.json", "{2}")], vec![])).unwrap();
    assert_eq!(reader.read("config.json").unwrap_err().code(), "store_changed");
    // The path of generation 1 has other content now, and that is no damage.
    commit(&mut store, &(vec![("config.json", "{3}")], vec![])).unwrap();
    assert_eq!(reader.read("config.json").unwrap_err().code(), "store_changed");
    assert_eq!(open(&files, false).unwrap().read("config.json").unwrap(), b"{3}");
}

#[test]
fn one_writer_at_a_time() {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    assert_eq!(open(&files, true).err().unwrap().code(), "store_locked");
    assert_eq!(Store::create(&files).err().unwrap().code(), "store_locked");
    let mut reader = open(&files, false).unwrap();
    assert_eq!(commit(&mut reader, &script()[0]).unwrap_err().code(), "store_read_only");
    store.close();
    assert_eq!(commit(&mut store, &script()[0]).unwrap_err().code(), "store_closed");
    assert_eq!(Store::create(&files).err().unwrap().code(), "store_exists");
    open(&files, true).unwrap();
}

#[test]
fn bad_names_are_refused_and_nothing_is_written() {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    commit(&mut store, &script()[0]).unwrap();
    let before = files.tree();
    let long = "x".repeat(201);
    for name in [
        "",
        "/etc/passwd",
        "../up",
        "a/../b",
        "a//b",
        ".hidden",
        "a/.b",
        "a\nb",
        "a b",
        "é",
        "a\\b",
        MANIFEST,
        PENDING,
        TEMPORARY,
        &long,
        "a/b/c/d/e/f/g/h/i",
    ] {
        let put = BTreeMap::from([(name.to_owned(), &b"x"[..])]);
        assert_eq!(store.commit(&put, &[]).unwrap_err().code(), "file_name_invalid", "{name:?}");
    }
    assert_eq!(store.commit(&BTreeMap::new(), &["no".to_owned()]).unwrap_err().code(), "file_unknown");
    let below = BTreeMap::from([("config.json/below".to_owned(), &b"x"[..])]);
    assert_eq!(store.commit(&below, &["config.json".to_owned()]).unwrap_err().code(), "path_taken");
    let both = BTreeMap::from([("new".to_owned(), &b"x"[..]), ("new/below".to_owned(), &b"x"[..])]);
    assert_eq!(store.commit(&both, &[]).unwrap_err().code(), "file_name_invalid");
    let again = BTreeMap::from([("config.json".to_owned(), &b"x"[..])]);
    assert_eq!(store.commit(&again, &["config.json".to_owned()]).unwrap_err().code(), "file_name_invalid");
    assert_eq!(files.tree(), before);
}

#[test]
fn links_and_strangers_are_not_followed() {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    files.put_link("tasks");
    let put = BTreeMap::from([("tasks/a".to_owned(), &b"x"[..])]);
    assert_eq!(store.commit(&put, &[]).unwrap_err().code(), "path_taken");
    files.put_link("a.bin");
    files.put_link("a.g1.bin");
    let put = BTreeMap::from([("a.bin".to_owned(), &b"x"[..])]);
    assert_eq!(store.commit(&put, &[]).unwrap_err().code(), "path_taken");
}

fn place(files: &MemoryFs, path: &str, bytes: &[u8]) {
    let _ = files.remove_file(path);
    files.create_file(path).unwrap().write_all(bytes).unwrap();
}

#[test]
fn a_hostile_note_of_a_commit_removes_nothing_of_value() {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    commit(&mut store, &script()[0]).unwrap();
    drop(store);
    let notes = [
        r#"{"generation":2,"paths":["../x","config.json","manifest.json",".lock","/etc/passwd","tasks"]}"#.to_owned(),
        "{".to_owned(),
        "[".repeat(100_000),
        "\u{0}".repeat(100),
    ];
    for note in &notes {
        place(&files, PENDING, note.as_bytes());
        check(&files, 1..=1, &note.chars().take(20).collect::<String>());
    }
}

fn sample() -> (MemoryFs, Vec<u8>) {
    let files = MemoryFs::default();
    let mut store = Store::create(&files).unwrap();
    for step in script().iter().take(2) {
        commit(&mut store, step).unwrap();
    }
    drop(store);
    let manifest = files.tree()[MANIFEST].clone();
    (files, manifest)
}

#[test]
fn hostile_manifests_are_named() {
    let (files, manifest) = sample();
    let text = String::from_utf8(manifest).unwrap();
    let code = |text: &str| {
        place(&files, MANIFEST, text.as_bytes());
        open(&files, false).err().map(|error| error.code())
    };
    assert_eq!(code(&text), None);
    assert_eq!(code(&text.replace("\"version\": 1", "\"version\": 2")), Some("format_version"));
    for bad in [
        text.replace("\"version\": 1", "\"version\": 0"),
        text.replace("moses-run", "moses-jog"),
        text.replace("\"generation\": 2", "\"generation\": 3"),
        text.replace("\"path\": \"config.json\"", "\"path\": \"../config.json\""),
        text.replace("\"path\": \"config.json\"", "\"path\": \"/etc/passwd\""),
        text.replace("\"config.json\": {", "\"conf\\u0000.json\": {"),
        text.replace("\"bytes\": 3", "\"bytes\": 18446744073709551615"),
        text.replace("\"bytes\": 3", "\"bytes\": 3, \"more\": 1"),
        text.replace("\"generation\": 2", "\"generation\": 2, \"generation\": 2"),
        text.replacen("registry.moses\": {", "config.json\": {", 1),
        text.replace("registry.g2.moses\"", "config.json\""),
        "[".repeat(1_000_000),
        format!("{{\"format\":\"moses-run\",\"version\":1,\"files\":{}", "{\"a\":".repeat(100_000)),
        String::new(),
        "null".to_owned(),
    ] {
        assert_ne!(bad, text);
        assert_eq!(code(&bad), Some("manifest_invalid"), "{bad:.200}");
    }
    place(&files, MANIFEST, b"\xff\xfe");
    assert_eq!(open(&files, false).err().unwrap().code(), "manifest_invalid");
    place(&files, MANIFEST, &vec![b' '; (16 << 20) + 1]);
    assert_eq!(open(&files, false).err().unwrap().code(), "manifest_invalid");
}

#[test]
fn damage_of_files_is_named() {
    let (files, _) = sample();
    let store = open(&files, false).unwrap();
    let path = store.files()["registry.moses"].path.clone();
    let verdict = || {
        let damages = store.verify().unwrap();
        let read = store.read("registry.moses").err().map(|error| error.code());
        assert_eq!(damages.first().map(|damage| damage.code), read);
        damages.first().map(|damage| format!("{}: {}", damage.name, damage.message))
    };
    assert_eq!(verdict(), None);
    place(&files, &path, b"second regisTry");
    assert!(verdict().unwrap().contains("the hash is wrong"));
    place(&files, &path, b"second registr");
    assert!(verdict().unwrap().contains("it has 14 bytes where 15 were written"));
    files.remove_file(&path).unwrap();
    assert!(verdict().unwrap().contains("is missing"));
    files.put_link(&path);
    assert!(verdict().unwrap().contains("not a regular file"));
    assert_eq!(store.read("nothing").unwrap_err().code(), "file_unknown");
}

proptest! {
    #[test]
    fn every_flipped_bit_of_a_manifest_is_found(position in any::<prop::sample::Index>(), bit in 0..8) {
        let (files, manifest) = sample();
        let mut bytes = manifest.clone();
        let at = position.index(bytes.len());
        bytes[at] ^= 1_u8 << bit;
        place(&files, MANIFEST, &bytes);
        if let Ok(store) = open(&files, false) {
            // Only white space may differ and mean the same.
            prop_assert!(manifest[at].is_ascii_whitespace());
            prop_assert_eq!(content(&store), expected(2));
        }
    }
}
