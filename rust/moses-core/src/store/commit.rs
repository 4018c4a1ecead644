//! The commit, and the clearing of what an unfinished one left.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use serde::{Deserialize, Serialize};

use super::manifest::{FileInfo, MANIFEST, Manifest, name_problem};
use super::{PENDING, Store, TEMPORARY, at, is_not_a_folder, read_capped, read_manifest};
use crate::vfs::{Entry, FileSystem, parent, replace, write_synced};
use crate::{Error, Result};

/// What a commit is about to write and to replace: after a crash, those that the manifest does not name are removed.
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Pending {
    generation: u64,
    paths: BTreeSet<String>,
}

impl<F: FileSystem> Store<F> {
    /// Puts and deletes files, all or none; the result is the new generation. An error says which state is in place: all
    /// but `commit_not_durable` and `commit_unknown` leave the old one.
    ///
    /// # Errors
    /// `file_name_invalid`, `file_unknown`, `path_taken`, `store_read_only`, `store_closed`, `commit_not_durable`,
    /// `commit_unknown`, `io`.
    pub fn commit(&mut self, put: &BTreeMap<String, &[u8]>, delete: &[String]) -> Result<u64> {
        self.check_open()?;
        if self.lock.is_none() {
            return Err(Error::ReadOnly { path: self.files.root() });
        }
        self.clear_leftovers()?;
        let next = self.next_manifest(put, delete)?;
        if let Err(error) = self
            .write_files(put, &next)
            .and_then(|()| self.place_manifest(&next.to_bytes()).map_err(Error::io(self.at(MANIFEST), "writing")))
        {
            return Err(self.settle(error, next));
        }
        let synced = self.files.sync_folder("");
        let generation = next.generation;
        self.manifest = next;
        if let Err(source) = synced {
            // The old files stay: a power cut may bring the old manifest back.
            return Err(Error::NotDurable { path: self.files.root(), generation, source });
        }
        // The commit is done; what cannot be removed now is removed by the next writer.
        let _ = self.clear_leftovers();
        Ok(generation)
    }

    /// After an error on the way to the commit point: finds out which state is in place.
    fn settle(&mut self, error: Error, next: Manifest) -> Error {
        let generation = next.generation;
        match read_manifest(&self.files) {
            Ok(found) if found == self.manifest => {
                // The first error is the one to tell; what stays is removed by the next writer.
                let _ = self.clear_leftovers();
                error
            }
            Ok(found) if found == next => {
                self.manifest = next;
                Error::NotDurable { path: self.files.root(), generation, source: io::Error::other(error.to_string()) }
            }
            _ => {
                self.close();
                Error::Unknown { path: self.files.root(), generation, source: io::Error::other(error.to_string()) }
            }
        }
    }

    fn next_manifest(&self, put: &BTreeMap<String, &[u8]>, delete: &[String]) -> Result<Manifest> {
        let unusable = |name: &String, problem| Error::FileNameInvalid { name: name.clone(), problem };
        let mut next = self.manifest.clone();
        next.generation = next.generation.saturating_add(1);
        for name in delete {
            if put.contains_key(name) {
                return Err(unusable(name, "it is to be put and to be deleted"));
            }
            self.info(name)?;
            next.files.remove(name);
        }
        let mut taken: BTreeSet<String> = self.manifest.files.values().map(|info| info.path.clone()).collect();
        for (name, content) in put {
            if let Some(problem) = name_problem(name) {
                return Err(unusable(name, problem));
            }
            let path = self.free_path(name, next.generation, &taken)?;
            taken.insert(path.clone());
            let info = FileInfo { path, bytes: content.len() as u64, blake3: crate::hash::hash_hex(content) };
            next.files.insert(name.clone(), info);
        }
        next.check().map_err(|_| {
            let name = put.keys().next().cloned().unwrap_or_default();
            Error::FileNameInvalid { name, problem: "a file would be a folder too, or there would be too many files" }
        })?;
        Ok(next)
    }

    /// Where a file can go without touching what is there: its name, or its name with the generation.
    fn free_path(&self, name: &str, generation: u64, taken: &BTreeSet<String>) -> Result<String> {
        let start = name.rfind('/').map_or(0, |slash| slash.saturating_add(1));
        let dot = name.rfind('.').filter(|&dot| dot > start).unwrap_or(name.len());
        let (stem, suffix) = name.split_at(dot);
        for path in [name.to_owned(), format!("{stem}.g{generation}{suffix}")] {
            let entry = match self.files.entry(&path) {
                Err(error) if is_not_a_folder(&error) => break,
                entry => entry.map_err(Error::io(self.at(&path), "looking at"))?,
            };
            if entry.is_none() && !taken.contains(&path) && name_problem(&path).is_none() {
                return Ok(path);
            }
        }
        Err(Error::PathTaken { name: name.to_owned(), path: self.at(name) })
    }

    fn write_files(&self, put: &BTreeMap<String, &[u8]>, next: &Manifest) -> Result<()> {
        let old: BTreeSet<&str> = self.manifest.files.values().map(|info| info.path.as_str()).collect();
        let new: BTreeSet<&str> = next.files.values().map(|info| info.path.as_str()).collect();
        let paths = old.symmetric_difference(&new).map(|&path| path.to_owned()).collect();
        let pending = serde_json::to_vec(&Pending { generation: next.generation, paths }).unwrap_or_default();
        write_synced(&self.files, PENDING, &pending).map_err(Error::io(self.at(PENDING), "writing"))?;
        // What is pending must be known for sure before any of it is there.
        self.sync("")?;
        let mut folders = BTreeSet::new();
        for (name, content) in put {
            let Some(info) = next.files.get(name) else { continue };
            self.make_folders(parent(&info.path), &mut folders)?;
            write_synced(&self.files, &info.path, content).map_err(Error::io(self.at(&info.path), "writing"))?;
        }
        // A name counts once its folder is synced, and the folder's name in its own.
        folders.iter().rev().try_for_each(|folder| self.sync(folder))
    }

    /// Makes a folder and those above it, and notes all of them.
    fn make_folders(&self, folder: &str, noted: &mut BTreeSet<String>) -> Result<()> {
        if !noted.insert(folder.to_owned()) || folder.is_empty() {
            return Ok(());
        }
        self.make_folders(parent(folder), noted)?;
        match self.files.entry(folder).map_err(Error::io(self.at(folder), "looking at"))? {
            Some(Entry::Folder) => Ok(()),
            Some(_) => Err(Error::PathTaken { name: folder.to_owned(), path: self.at(folder) }),
            None => self.files.create_folder(folder).map_err(Error::io(self.at(folder), "creating")),
        }
    }

    fn sync(&self, folder: &str) -> Result<()> {
        self.files.sync_folder(folder).map_err(Error::io(self.at(folder), "syncing"))
    }

    pub(super) fn place_manifest(&self, bytes: &[u8]) -> io::Result<()> {
        replace(&self.files, TEMPORARY, MANIFEST, bytes)
    }

    /// Removes what an unfinished commit left: what it noted and the manifest does not name. The result is what to say.
    pub(super) fn clear_leftovers(&self) -> Result<Option<String>> {
        let gone = |result: io::Result<()>, path: &str| match result {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io(self.at(path), "removing")(error)),
            _ => Ok(()),
        };
        let present = |path: &str| self.files.entry(path).map_err(Error::io(self.at(path), "looking at"));
        let (pending, temporary) = (present(PENDING)?, present(TEMPORARY)?);
        if pending.is_none() && temporary.is_none() {
            return Ok(None);
        }
        // The manifest that is seen must be durable before anything that an older one names is removed.
        self.sync("")?;
        let noted = match pending {
            Some(_) => self.read_pending()?,
            None => None,
        };
        let paths = noted.as_ref().map(|pending| pending.paths.clone()).unwrap_or_default();
        let mut folders = BTreeSet::new();
        for path in paths.iter().filter(|path| name_problem(path).is_none() && !self.manifest.has_path(path)) {
            match present(path) {
                Ok(Some(Entry::File(_) | Entry::Other)) => gone(self.files.remove_file(path), path)?,
                // A folder is none of ours, and through a link nothing is reached.
                _ => continue,
            }
            let mut folder = parent(path);
            while !folder.is_empty() && self.files.remove_folder(folder).is_ok() {
                folder = parent(folder);
            }
            folders.insert(folder.to_owned());
        }
        gone(self.files.remove_file(TEMPORARY), TEMPORARY)?;
        for folder in folders {
            if matches!(present(&folder), Ok(Some(Entry::Folder))) {
                self.sync(&folder)?;
            }
        }
        self.sync("")?;
        gone(self.files.remove_file(PENDING), PENDING)?;
        let now = self.manifest.generation;
        Ok(Some(match noted {
            Some(pending) if pending.generation == now => {
                format!("the commit of generation {now} was complete: what it replaced was cleared away")
            }
            _ => format!("an unfinished commit was cleared away: generation {now} is in place"),
        }))
    }

    /// What a commit noted; `None` where the note is torn, for then nothing else of that commit was written.
    fn read_pending(&self) -> Result<Option<Pending>> {
        match read_capped(&self.files, PENDING) {
            Ok(content) => Ok(content.and_then(|content| serde_json::from_slice(&content).ok())),
            Err(error) if error.kind() == io::ErrorKind::InvalidData => Ok(None),
            Err(error) => Err(Error::io(at(&self.files, PENDING), "reading")(error)),
        }
    }
}
