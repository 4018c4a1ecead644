//! Which files of a folder may be opened: its own, and, for the snapshot of a hub cache, the blobs that it links to.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read as _;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};

use crate::limits::{MAX_COMPONENT_BYTES, MAX_FILES_BESIDE, MAX_SHARDS};
use crate::{Error, Result};

/// A file that was found, and what it was like then.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SourceFile {
    /// Its name in the folder.
    pub name: String,
    /// The file itself, behind the link where it is one.
    pub path: PathBuf,
    /// What the link says, where it is one.
    pub link: Option<PathBuf>,
    /// Its bytes.
    pub bytes: u64,
    /// Device, inode, and time of the last change: that of the file that was planned with.
    stamp: (u64, u64, i64, i64),
}

impl SourceFile {
    /// Opens it for reading.
    ///
    /// # Errors
    /// `source_changed` where it is another file by now, or was written to; `io`.
    pub fn open(&self) -> Result<File> {
        let shown = self.path.display().to_string();
        // NONBLOCK: opening a pipe must not wait for a writer.
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::NONBLOCK | OFlags::CLOEXEC;
        let file = rustix::fs::open(&self.path, flags, Mode::empty());
        let file = File::from(file.map_err(|error| Error::io(&*shown, "opening")(error.into()))?);
        let now = file.metadata().map_err(Error::io(&*shown, "looking at"))?;
        if !now.is_file() || stamp(&now) != self.stamp || now.len() != self.bytes {
            return Err(Error::SourceChanged { path: shown });
        }
        Ok(file)
    }
}

fn stamp(metadata: &std::fs::Metadata) -> (u64, u64, i64, i64) {
    (metadata.dev(), metadata.ino(), metadata.mtime(), metadata.mtime_nsec())
}

/// The names of the files of a folder, and those of its folders.
pub(super) fn list(path: &Path) -> Result<(BTreeSet<String>, Vec<String>)> {
    let shown = path.display().to_string();
    let (mut files, mut folders) = (BTreeSet::new(), Vec::new());
    for entry in std::fs::read_dir(path).map_err(Error::io(&*shown, "listing"))? {
        let entry = entry.map_err(Error::io(&*shown, "listing"))?;
        let name = entry.file_name().into_string().map_err(|name| Error::ShardPath {
            path: shown.clone(),
            name: name.to_string_lossy().into_owned(),
            problem: "it is not UTF-8",
        })?;
        if files.len() > MAX_FILES_BESIDE.saturating_add(MAX_SHARDS) || folders.len() > MAX_FILES_BESIDE {
            let limit = MAX_FILES_BESIDE as u64;
            return Err(Error::Oversized { what: "folder", value: files.len() as u64, limit });
        }
        let kind = entry.file_type().map_err(Error::io(&*shown, "listing"))?;
        if kind.is_dir() {
            folders.push(name);
        } else {
            files.insert(name);
        }
    }
    folders.sort();
    Ok((files, folders))
}

/// Checks that a name is that of a file in the folder itself.
pub(super) fn check_name(folder: &Path, name: &str) -> Result<()> {
    let problem = if name.is_empty() || name.len() > MAX_COMPONENT_BYTES {
        "it has no or too many characters"
    } else if name.starts_with('/') {
        "it is an absolute path"
    } else if name == "." || name == ".." || name.contains('/') {
        "it leads to another folder"
    } else if name.chars().any(char::is_control) {
        "it has control characters"
    } else {
        return Ok(());
    };
    Err(Error::ShardPath { path: folder.display().to_string(), name: name.to_owned(), problem })
}

/// The file of this name; `None` where nothing is there. `folder` has no links in it.
pub(super) fn resolve(folder: &Path, name: &str) -> Result<Option<SourceFile>> {
    check_name(folder, name)?;
    let path = folder.join(name);
    let shown = path.display().to_string();
    let wrong = |problem| Error::ShardPath { path: folder.display().to_string(), name: name.to_owned(), problem };
    let there = match std::fs::symlink_metadata(&path) {
        Ok(there) => there,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(Error::io(shown, "looking at")(error)),
    };
    if there.is_file() {
        let (bytes, stamp) = (there.len(), stamp(&there));
        return Ok(Some(SourceFile { name: name.to_owned(), path, link: None, bytes, stamp }));
    }
    if !there.is_symlink() {
        return Err(wrong("it is not a regular file"));
    }
    let link = std::fs::read_link(&path).map_err(Error::io(&*shown, "looking at"))?;
    let target = path.canonicalize().map_err(|_| wrong("it is a link to nothing"))?;
    if target.parent() != Some(folder) && target.parent() != blobs(folder).as_deref() {
        return Err(wrong("it is a link that leads out of the folder"));
    }
    let there = std::fs::symlink_metadata(&target).map_err(Error::io(&*shown, "looking at"))?;
    if !there.is_file() {
        return Err(wrong("it is a link to what is not a regular file"));
    }
    let (bytes, stamp) = (there.len(), stamp(&there));
    Ok(Some(SourceFile { name: name.to_owned(), path: target, link: Some(link), bytes, stamp }))
}

/// The folder of blobs, where `folder` is a snapshot of a hub cache: `MODEL/snapshots/REV` links to `MODEL/blobs/HASH`.
fn blobs(folder: &Path) -> Option<PathBuf> {
    let snapshots = folder.parent().filter(|parent| parent.file_name().is_some_and(|name| name == "snapshots"))?;
    Some(snapshots.parent()?.join("blobs"))
}

/// The content of a small file; `None` where it is not there.
pub(super) fn read(folder: &Path, name: &str, limit: u64) -> Result<Option<Vec<u8>>> {
    let Some(found) = resolve(folder, name)? else { return Ok(None) };
    if found.bytes > limit {
        return Err(Error::Oversized { what: "file of the checkpoint", value: found.bytes, limit });
    }
    let mut bytes = Vec::new();
    let read = found.open()?.take(limit).read_to_end(&mut bytes);
    read.map_err(Error::io(found.path.display().to_string(), "reading"))?;
    Ok(Some(bytes))
}
