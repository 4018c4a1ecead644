//! A folder of files with one commit point: whatever happens, a reader finds the old files or the new, never a mix.
//!
//! A commit, in this order: note in `.pending` what will be written and what will be replaced; write the new files, none
//! over a live one, and sync them and their folders; write the new manifest beside the old, sync it, rename it over the
//! old (the commit point) and sync the folder; remove what the manifest no longer names; remove `.pending`. A crash
//! before the rename leaves the old state, after it the new; the next writer clears what `.pending` names and the
//! manifest does not. Files that no commit wrote are never touched.
//!
//! One writer at a time, by a lock of the operating system that dies with its holder. Readers take no lock.

mod commit;
mod manifest;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::io;

pub use manifest::FileInfo;
use manifest::{MANIFEST, Manifest, Refused};

use crate::limits::MAX_MANIFEST_BYTES;
use crate::vfs::{Entry, FileSystem, parent};
use crate::{Error, Result};

const LOCK: &str = ".lock";
const PENDING: &str = ".pending";
const TEMPORARY: &str = ".manifest.tmp";

/// A run folder that is open.
pub struct Store<F: FileSystem> {
    files: F,
    /// Held by a writer.
    lock: Option<F::Lock>,
    manifest: Manifest,
    recovered: Option<String>,
    closed: bool,
}

/// One thing that is wrong with a file of a run folder.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Damage {
    /// The file's name.
    pub name: String,
    /// The code of the error that reading it gives.
    pub code: &'static str,
    /// The message of that error.
    pub message: String,
}

impl<F: FileSystem> Store<F> {
    /// Makes a run of generation 0 without files in a folder, and opens it for writing.
    ///
    /// # Errors
    /// `store_exists`, `store_locked`, `io`.
    pub fn create(files: F) -> Result<Self> {
        let lock = take_lock(&files)?;
        if files.entry(MANIFEST).map_err(Error::io(at(&files, MANIFEST), "looking at"))?.is_some() {
            return Err(Error::StoreExists { path: files.root() });
        }
        let store = Self { files, lock: Some(lock), manifest: Manifest::default(), recovered: None, closed: false };
        store.clear_leftovers()?;
        store.place_manifest(&store.manifest.to_bytes()).map_err(Error::io(store.at(MANIFEST), "writing"))?;
        store.files.sync_folder("").map_err(Error::io(store.files.root(), "syncing"))?;
        Ok(store)
    }

    /// Opens a run; a writer also clears what an unfinished commit left.
    ///
    /// # Errors
    /// `not_a_run`, `store_locked`, `manifest_invalid`, `format_version`, `io`.
    pub fn open(files: F, write: bool) -> Result<Self> {
        // Before the lock, so that a folder that is no run stays as it is.
        read_manifest(&files)?;
        let lock = if write { Some(take_lock(&files)?) } else { None };
        let manifest = read_manifest(&files)?;
        let mut store = Self { files, lock, manifest, recovered: None, closed: false };
        if write {
            store.recovered = store.clear_leftovers()?;
        }
        Ok(store)
    }

    /// Ends the use of the run and lets the lock go.
    pub fn close(&mut self) {
        self.closed = true;
        self.lock = None;
    }

    /// The number of commits that made what is there.
    #[must_use]
    pub fn generation(&self) -> u64 {
        self.manifest.generation
    }

    /// One sentence, where an unfinished commit was cleared away when the run was opened.
    #[must_use]
    pub fn recovered(&self) -> Option<&str> {
        self.recovered.as_deref()
    }

    /// The file system below.
    #[must_use]
    pub fn file_system(&self) -> &F {
        &self.files
    }

    /// The files, by name.
    #[must_use]
    pub fn files(&self) -> &BTreeMap<String, FileInfo> {
        &self.manifest.files
    }

    /// What the manifest says of a file.
    ///
    /// # Errors
    /// `file_unknown`, `store_closed`.
    pub fn info(&self, name: &str) -> Result<&FileInfo> {
        self.check_open()?;
        let found = self.manifest.files.get(name);
        found.ok_or_else(|| Error::FileUnknown { name: name.to_owned(), path: self.files.root() })
    }

    /// The content of a file, whose size and hash are checked.
    ///
    /// # Errors
    /// `file_unknown`, `file_missing`, `file_damaged`, `store_changed`, `store_closed`, `io`.
    pub fn read(&self, name: &str) -> Result<Vec<u8>> {
        let info = self.info(name)?;
        let mut content = Vec::new();
        self.check_size(name, info)
            .and_then(|()| {
                let size = usize::try_from(info.bytes).unwrap_or(usize::MAX);
                content.try_reserve_exact(size).map_err(|_| self.io(info, io::ErrorKind::OutOfMemory.into()))?;
                self.stream(info, &mut |piece| {
                    // A file that grows meanwhile is damaged all the same, and need not be held.
                    if content.len().saturating_add(piece.len()) <= size {
                        content.extend_from_slice(piece);
                    }
                })?;
                self.check_hash(name, info, &crate::hash::hash_hex(&content))
            })
            .map_err(|error| self.or_changed(error))?;
        Ok(content)
    }

    /// Everything that is wrong with the files: never an error for damage that has a name.
    ///
    /// # Errors
    /// `store_closed`.
    pub fn verify(&self) -> Result<Vec<Damage>> {
        self.check_open()?;
        let mut damages = Vec::new();
        for (name, info) in &self.manifest.files {
            let checked = self.check_size(name, info).and_then(|()| {
                let mut hasher = blake3::Hasher::new();
                self.stream(info, &mut |piece| {
                    hasher.update(piece);
                })?;
                self.check_hash(name, info, &hasher.finalize().to_hex())
            });
            if let Err(error) = checked.map_err(|error| self.or_changed(error)) {
                damages.push(Damage { name: name.clone(), code: error.code(), message: error.to_string() });
            }
        }
        Ok(damages)
    }

    fn check_size(&self, name: &str, info: &FileInfo) -> Result<()> {
        let damaged = |problem: String| Err(self.damaged(name, info, problem));
        match self.files.entry(&info.path) {
            Ok(Some(Entry::File(bytes))) if bytes == info.bytes => Ok(()),
            Ok(Some(Entry::File(bytes))) => damaged(format!("it has {bytes} bytes where {} were written", info.bytes)),
            Ok(Some(_)) => damaged("it is not a regular file".to_owned()),
            Ok(None) => Err(Error::FileMissing { name: name.to_owned(), path: self.at(&info.path) }),
            // A folder on the way is a link or a file.
            Err(error) if is_not_a_folder(&error) => damaged("its folder is not a folder".to_owned()),
            Err(error) => Err(self.io(info, error)),
        }
    }

    fn check_hash(&self, name: &str, info: &FileInfo, hash: &str) -> Result<()> {
        if hash == info.blake3 {
            return Ok(());
        }
        Err(self.damaged(name, info, "its content is not what was written (the hash is wrong)".to_owned()))
    }

    fn stream(&self, info: &FileInfo, each: &mut dyn FnMut(&[u8])) -> Result<()> {
        self.files.read(&info.path, each).map_err(|error| self.io(info, error))
    }

    /// A reader that misses a file may only be late: then that is what it is told.
    fn or_changed(&self, error: Error) -> Error {
        match read_manifest(&self.files) {
            Ok(now) if now.generation != self.manifest.generation => {
                Error::StoreChanged { path: self.files.root(), from: self.manifest.generation, to: now.generation }
            }
            _ => error,
        }
    }

    fn damaged(&self, name: &str, info: &FileInfo, problem: String) -> Error {
        Error::FileDamaged { name: name.to_owned(), path: self.at(&info.path), problem }
    }

    fn io(&self, info: &FileInfo, error: io::Error) -> Error {
        Error::io(self.at(&info.path), "reading")(error)
    }

    fn check_open(&self) -> Result<()> {
        if self.closed { Err(Error::StoreClosed { path: self.files.root() }) } else { Ok(()) }
    }

    /// A path for messages.
    fn at(&self, path: &str) -> String {
        at(&self.files, path)
    }
}

fn at(files: &impl FileSystem, path: &str) -> String {
    format!("{}/{path}", files.root())
}

fn is_not_a_folder(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotADirectory || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error())
}

fn take_lock<F: FileSystem>(files: &F) -> Result<F::Lock> {
    let lock = files.try_lock(LOCK).map_err(Error::io(at(files, LOCK), "locking"))?;
    lock.ok_or_else(|| Error::StoreLocked { path: files.root() })
}

/// The content of a small file of the store's own, capped.
fn read_capped(files: &impl FileSystem, path: &str) -> io::Result<Option<Vec<u8>>> {
    match files.entry(path)? {
        None => return Ok(None),
        Some(Entry::File(bytes)) if bytes <= MAX_MANIFEST_BYTES => {}
        Some(Entry::File(_)) => return Err(io::Error::new(io::ErrorKind::InvalidData, "it is too large")),
        Some(_) => return Err(io::Error::new(io::ErrorKind::InvalidData, "it is not a regular file")),
    }
    let mut content = Vec::new();
    let read = files.read(path, &mut |piece| {
        if content.len() as u64 <= MAX_MANIFEST_BYTES {
            content.extend_from_slice(piece);
        }
    });
    match read {
        Ok(()) => Ok(Some(content)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn read_manifest(files: &impl FileSystem) -> Result<Manifest> {
    let path = at(files, MANIFEST);
    let invalid = |problem: String| Error::Manifest { path: path.clone(), problem };
    let content = read_capped(files, MANIFEST).map_err(|error| match error.kind() {
        io::ErrorKind::InvalidData => invalid(error.to_string()),
        _ => Error::io(path.clone(), "reading")(error),
    })?;
    let content = content.ok_or_else(|| Error::NotARun { path: files.root() })?;
    Manifest::from_bytes(&content).map_err(|refused| match refused {
        Refused::Version(version) => Error::Version { what: "manifest", version, known: 1 },
        Refused::Problem(problem) => invalid(problem),
    })
}
