//! Doing the moves: into a folder beside the output's place, synced, and then put there by one rename.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, mpsc};
use std::time::Duration;

use serde_json::{Value, json};

use super::disk::{Disk, lock};
use super::job::{Fate, Job, OutFile, OutShard, OutTensor, Piece, ShardContent};
use crate::checkpoint::{RECORD, SourceFile};
use crate::limits::{MOVE_BYTES, MOVE_THREADS};
use crate::{Error, Result};

/// Bytes that are moved between two looks at whether to stop.
const STEP_BYTES: u64 = 64 << 20;
/// How often progress is told.
const TELL: Duration = Duration::from_millis(50);

/// Where the output goes, and how.
#[derive(Debug, Clone)]
pub struct Target {
    /// The folder; of work in place, the checkpoint's own.
    pub path: PathBuf,
    /// Whether shards that do not change are linked.
    pub link: bool,
    /// Whether the hashes of what was kept are recorded.
    pub hash: bool,
    /// Threads that move shards.
    pub threads: usize,
}

impl Target {
    /// A new folder, written by as many threads as pay.
    #[must_use]
    pub fn new(path: PathBuf) -> Self {
        Self { path, link: false, hash: false, threads: MOVE_THREADS }
    }
}

/// What was done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Done {
    /// The output's folder.
    pub path: PathBuf,
    /// Bytes that were written into shards.
    pub bytes_written: u64,
}

struct Work<'a> {
    disk: &'a dyn Disk,
    job: &'a Job,
    target: &'a Target,
    sources: Sources<'a>,
    done: AtomicU64,
    stop: AtomicBool,
    hashes: Mutex<BTreeMap<String, String>>,
    /// Names of the tensors that are written; the same ones in a shard that stays are stale.
    written: BTreeSet<&'a str>,
}

/// The sources' files, opened when they are needed and not more at a time than shards are worked on.
struct Sources<'a> {
    files: &'a [SourceFile],
}

impl Sources<'_> {
    fn open(&self, shard: u32) -> Result<File> {
        let file = self.files.get(shard as usize);
        file.ok_or_else(|| Error::SourceChanged { path: format!("shard {shard}") })?.open()
    }
}

/// Does the work. `progress` is told the bytes done and to do, and says whether to go on.
///
/// # Errors
/// `output_exists`, `output_inside`, `source_changed`, `no_space`, `surgery_busy`, `cancelled`, `surgery_unsupported`, `io`; then the output is
/// not there, and of work in place the folder is as it was.
pub fn execute(disk: &dyn Disk, job: &Job, target: &Target, progress: &dyn Fn(u64, u64) -> bool) -> Result<Done> {
    let (parent, name) = place(job, target)?;
    let total = job.bytes_written(target.link || job.in_place);
    check_space(&parent, total)?;
    let out = parent.join(&name);
    let temporary = parent.join(format!(".{name}.moses-surgery"));
    let at = |path: &Path, doing| Error::io(path.display().to_string(), doing);
    let held = begin(disk, &temporary)?;
    let work = Work {
        disk,
        job,
        target,
        sources: Sources { files: &job.sources },
        done: AtomicU64::new(0),
        stop: AtomicBool::new(false),
        hashes: Mutex::new(BTreeMap::new()),
        written: job.shards.iter().flat_map(OutShard::tensors).map(|tensor| tensor.name.as_str()).collect(),
    };
    let written = work.write(&temporary, total, progress).and_then(|()| {
        disk.sync_folder(&temporary).map_err(at(&temporary, "syncing"))?;
        if job.in_place {
            disk.exchange(&temporary, &out).map_err(|error| exchange_failed(&out, error))
        } else {
            disk.rename_new(&temporary, &out).map_err(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Error::OutputExists { path: out.display().to_string() },
                _ => at(&out, "renaming")(error),
            })
        }
    });
    if let Err(error) = written {
        // The first error is the one to tell; what cannot be removed is hidden, and the next run removes it.
        let _ = disk.remove_tree(&temporary);
        return Err(error);
    }
    disk.sync_folder(&parent).map_err(at(&parent, "syncing the folder of the finished output"))?;
    if job.in_place {
        // What was exchanged away: its bytes live on in the links of the new folder.
        let _ = disk.remove_tree(&temporary);
    }
    drop(held);
    Ok(Done { path: out, bytes_written: total })
}

fn exchange_failed(out: &Path, error: io::Error) -> Error {
    match error.raw_os_error().map(rustix::io::Errno::from_raw_os_error) {
        Some(rustix::io::Errno::INVAL | rustix::io::Errno::NOSYS | rustix::io::Errno::OPNOTSUPP) => Error::Unsupported {
            what: out.display().to_string(),
            problem: "its file system cannot exchange two folders, so nothing can change in place: write to another folder".to_owned(),
        },
        _ => Error::io(out.display().to_string(), "exchanging the folders")(error),
    }
}

/// The folder that the output goes into, and its name there.
fn place(job: &Job, target: &Target) -> Result<(PathBuf, String)> {
    let shown = target.path.display().to_string();
    let invalid = |problem: &str| Error::Unsupported { what: shown.clone(), problem: problem.to_owned() };
    if job.in_place {
        let path = job.source_paths.first().ok_or_else(|| invalid("it is no checkpoint"))?;
        let name = path.file_name().and_then(|name| name.to_str());
        let (parent, name) =
            path.parent().zip(name).ok_or_else(|| invalid("its name cannot be used: it is not UTF-8, or the root"))?;
        return Ok((parent.to_owned(), name.to_owned()));
    }
    if std::fs::symlink_metadata(&target.path).is_ok() {
        return Err(Error::OutputExists { path: shown });
    }
    let absolute = std::path::absolute(&target.path).map_err(Error::io(&*shown, "looking at"))?;
    let name = absolute.file_name().and_then(|name| name.to_str());
    let (parent, name) =
        absolute.parent().zip(name).ok_or_else(|| invalid("its name cannot be used: it is not UTF-8"))?;
    let parent = parent.canonicalize().map_err(Error::io(parent.display().to_string(), "opening"))?;
    for source in &job.source_paths {
        if parent.starts_with(source) {
            return Err(Error::OutputInside { path: shown, source_path: source.display().to_string() });
        }
    }
    Ok((parent, name.to_owned()))
}

fn check_space(parent: &Path, needed: u64) -> Result<()> {
    let Ok(there) = rustix::fs::statvfs(parent) else { return Ok(()) };
    let free = there.f_bavail.saturating_mul(there.f_frsize);
    // Some network file systems say 0 of both.
    if needed > free && there.f_blocks > 0 {
        return Err(Error::NoSpace { path: parent.display().to_string(), needed, free });
    }
    Ok(())
}

/// Makes the folder beside the output's place; one that a killed process left is removed.
fn begin(disk: &dyn Disk, temporary: &Path) -> Result<Option<File>> {
    let at = |doing| Error::io(temporary.display().to_string(), doing);
    let busy = || Error::SurgeryBusy { path: temporary.display().to_string() };
    if std::fs::symlink_metadata(temporary).is_ok() {
        let left = lock(temporary).map_err(at("locking"))?.ok_or_else(busy)?;
        disk.remove_tree(temporary).map_err(at("removing what a stopped run left"))?;
        drop(left);
    }
    disk.create_folder(temporary).map_err(at("creating"))?;
    let held = lock(temporary).map_err(at("locking"))?;
    Ok(Some(held.ok_or_else(busy)?))
}

impl Work<'_> {
    fn write(&self, folder: &Path, total: u64, progress: &dyn Fn(u64, u64) -> bool) -> Result<()> {
        let next = AtomicUsize::new(0);
        let failed: Mutex<Option<Error>> = Mutex::new(None);
        std::thread::scope(|scope| {
            let (tell, told) = mpsc::channel::<()>();
            for _ in 0..self.target.threads.clamp(1, self.job.shards.len().max(1)) {
                let tell = tell.clone();
                let (next, failed) = (&next, &failed);
                scope.spawn(move || {
                    let _tell = tell;
                    while let Some(shard) = self.job.shards.get(next.fetch_add(1, Ordering::Relaxed)) {
                        if self.stop.load(Ordering::Relaxed) {
                            break;
                        }
                        if let Err(error) = self.shard(folder, shard) {
                            self.stop.store(true, Ordering::Relaxed);
                            if let Ok(mut failed) = failed.lock() {
                                failed.get_or_insert(error);
                            }
                        }
                    }
                });
            }
            drop(tell);
            // Ends when the last worker has dropped its end.
            while let Err(mpsc::RecvTimeoutError::Timeout) = told.recv_timeout(TELL) {
                if !progress(self.done.load(Ordering::Relaxed), total) {
                    self.stop.store(true, Ordering::Relaxed);
                }
            }
        });
        if let Some(error) = failed.into_inner().ok().flatten() {
            return Err(error);
        }
        if self.stop.load(Ordering::Relaxed) || !progress(self.done.load(Ordering::Relaxed), total) {
            return Err(self.cancelled());
        }
        for file in &self.job.files {
            self.file(folder, file)?;
        }
        if self.job.in_place {
            self.keep_the_rest(folder)?;
        }
        self.record(folder)
    }

    fn cancelled(&self) -> Error {
        Error::Cancelled { path: self.target.path.display().to_string() }
    }

    fn shard(&self, folder: &Path, shard: &OutShard) -> Result<()> {
        let path = folder.join(&shard.name);
        let at = |doing| Error::io(path.display().to_string(), doing);
        let tensors = match &shard.content {
            ShardContent::Whole(number) => {
                let source = self.job.sources.get(*number as usize);
                let source = source.ok_or_else(|| Error::SourceChanged { path: shard.name.clone() })?;
                return self.whole(source, &path);
            }
            ShardContent::Tensors(header, tensors) => (header, tensors),
        };
        let file = self.disk.create_file(&path).map_err(at("creating"))?;
        let (header, tensors) = tensors;
        self.disk.write_at(&file, header, 0).map_err(at("writing"))?;
        let mut moves =
            Moves { work: self, to: &file, path: &path, place: header.len() as u64, open: None, pending: None };
        for tensor in tensors {
            moves.tensor(tensor)?;
        }
        moves.flush()?;
        self.disk.sync(&file).map_err(at("syncing"))
    }

    fn whole(&self, source: &SourceFile, path: &Path) -> Result<()> {
        let at = |doing| Error::io(path.display().to_string(), doing);
        if self.target.hash {
            self.hash_whole(source)?;
        }
        if self.job.in_place {
            return self.same(source, path);
        }
        if self.target.link {
            source.open()?;
            match self.disk.link(&source.path, path) {
                Ok(()) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::CrossesDevices => {}
                Err(error) => return Err(at("linking")(error)),
            }
        }
        let from = source.open()?;
        let to = self.disk.create_file(path).map_err(at("creating"))?;
        self.copy(&from, 0, &to, 0, source.bytes, path)?;
        self.disk.sync(&to).map_err(at("syncing"))
    }

    /// The hashes of a shard that stays as it is, but for tensors that another shard hides.
    fn hash_whole(&self, source: &SourceFile) -> Result<()> {
        let shown = source.path.display().to_string();
        let file = source.open()?;
        let (header, data) = crate::shard::read_header_of(&file, &shown)?;
        let mut bytes = Vec::new();
        for (name, place) in header.tensors {
            if self.written.contains(name.as_str()) {
                continue;
            }
            let mut hasher = blake3::Hasher::new();
            let (mut at, mut left) = (place.begin.saturating_add(data), place.end.saturating_sub(place.begin));
            while left > 0 {
                bytes.resize(usize::try_from(left).unwrap_or(MOVE_BYTES).min(MOVE_BYTES), 0);
                file.read_exact_at(&mut bytes, at).map_err(Error::io(&*shown, "reading"))?;
                hasher.update(&bytes);
                at = at.saturating_add(bytes.len() as u64);
                left = left.saturating_sub(bytes.len() as u64);
            }
            if let Ok(mut hashes) = self.hashes.lock() {
                hashes.insert(name, hasher.finalize().to_hex().to_string());
            }
        }
        Ok(())
    }

    /// The same file under a new name: a hard link, or the same symbolic link.
    fn same(&self, source: &SourceFile, path: &Path) -> Result<()> {
        let at = |doing| Error::io(path.display().to_string(), doing);
        source.open()?;
        match &source.link {
            Some(link) => self.disk.symlink(link, path).map_err(at("linking")),
            None => self.disk.link(&source.path, path).map_err(at("linking")),
        }
    }

    fn copy(&self, from: &File, from_at: u64, to: &File, to_at: u64, len: u64, path: &Path) -> Result<()> {
        let mut moved: u64 = 0;
        while moved < len {
            if self.stop.load(Ordering::Relaxed) {
                return Err(self.cancelled());
            }
            let step = len.saturating_sub(moved).min(STEP_BYTES);
            let (from_at, to_at) = (from_at.saturating_add(moved), to_at.saturating_add(moved));
            self.disk.copy(from, from_at, to, to_at, step).map_err(Error::io(path.display().to_string(), "writing"))?;
            self.done.fetch_add(step, Ordering::Relaxed);
            moved = moved.saturating_add(step);
        }
        Ok(())
    }

    fn file(&self, folder: &Path, file: &OutFile) -> Result<()> {
        let (OutFile::Bytes(name, _) | OutFile::Copy(SourceFile { name, .. })) = file;
        let path = folder.join(name);
        let at = |doing| Error::io(path.display().to_string(), doing);
        let to = match file {
            OutFile::Bytes(_, bytes) => {
                let to = self.disk.create_file(&path).map_err(at("creating"))?;
                self.disk.write_at(&to, bytes, 0).map_err(at("writing"))?;
                to
            }
            OutFile::Copy(source) if self.job.in_place => return self.same(source, &path),
            OutFile::Copy(source) => {
                let from = source.open()?;
                let to = self.disk.create_file(&path).map_err(at("creating"))?;
                self.disk.copy(&from, 0, &to, 0, source.bytes).map_err(at("writing"))?;
                // A tokenizer that is as it was is as old as it was.
                let changed = from.metadata().and_then(|metadata| metadata.modified());
                changed.and_then(|time| to.set_modified(time)).map_err(at("setting the time of"))?;
                to
            }
        };
        self.disk.sync(&to).map_err(at("syncing"))
    }

    /// What lies in the folder and is no part of the checkpoint stays there too.
    fn keep_the_rest(&self, folder: &Path) -> Result<()> {
        let Some(source) = self.job.source_paths.first() else { return Ok(()) };
        let mut written: Vec<&str> = vec![RECORD, crate::checkpoint::INDEX];
        written.extend(self.job.sources.iter().map(|file| file.name.as_str()));
        written.extend(self.job.files.iter().map(|file| match file {
            OutFile::Bytes(name, _) | OutFile::Copy(SourceFile { name, .. }) => name.as_str(),
        }));
        self.link_tree(source, folder, &|name| written.contains(&name), 0)
    }

    fn link_tree(&self, from: &Path, to: &Path, skip: &dyn Fn(&str) -> bool, depth: usize) -> Result<()> {
        let at = |path: &Path, doing| Error::io(path.display().to_string(), doing);
        if depth > crate::limits::MAX_FILE_DEPTH {
            let problem = "it has folders in folders, too deep to be carried along: move them away".to_owned();
            return Err(Error::Unsupported { what: from.display().to_string(), problem });
        }
        for entry in std::fs::read_dir(from).map_err(at(from, "listing"))? {
            let entry = entry.map_err(at(from, "listing"))?;
            let name = entry.file_name();
            if name.to_str().is_some_and(skip) {
                continue;
            }
            let (old, new) = (entry.path(), to.join(&name));
            let kind = entry.file_type().map_err(at(&old, "looking at"))?;
            if kind.is_dir() {
                self.disk.create_folder(&new).map_err(at(&new, "creating"))?;
                self.link_tree(&old, &new, &|_| false, depth.saturating_add(1))?;
                self.disk.sync_folder(&new).map_err(at(&new, "syncing"))?;
            } else if kind.is_symlink() {
                let content = std::fs::read_link(&old).map_err(at(&old, "looking at"))?;
                self.disk.symlink(&content, &new).map_err(at(&new, "linking"))?;
            } else {
                self.disk.link(&old, &new).map_err(at(&new, "linking"))?;
            }
        }
        Ok(())
    }

    fn record(&self, folder: &Path) -> Result<()> {
        let mut record = self.job.record.clone();
        let hashes = self.hashes.lock().map(|hashes| hashes.clone()).unwrap_or_default();
        if let (Value::Object(fields), true) = (&mut record, self.target.hash) {
            fields.insert("blake3".to_owned(), json!(hashes));
        }
        self.file(folder, &OutFile::Bytes(RECORD.to_owned(), format!("{record}\n").into_bytes()))
    }
}

/// The moves of one shard, those that lie together in both files made one.
struct Moves<'a> {
    work: &'a Work<'a>,
    to: &'a File,
    path: &'a Path,
    /// Where the next byte goes.
    place: u64,
    /// The source that is open.
    open: Option<(u32, Arc<File>)>,
    /// A move that may go on: shard, first byte, bytes, and where it goes.
    pending: Option<(u32, u64, u64, u64)>,
}

impl Moves<'_> {
    fn tensor(&mut self, tensor: &OutTensor) -> Result<()> {
        let mut hasher = (self.work.target.hash && tensor.fate != Fate::Made).then(blake3::Hasher::new);
        for piece in &tensor.pieces {
            match (piece, &mut hasher) {
                (Piece::Copy(region), None) => {
                    let goes_on = self.pending.is_some_and(|(shard, from, len, _)| {
                        shard == region.shard && from.saturating_add(len) == region.offset
                    });
                    if !goes_on {
                        self.flush()?;
                        self.pending = Some((region.shard, region.offset, 0, self.place));
                    }
                    if let Some((_, _, len, _)) = &mut self.pending {
                        *len = len.saturating_add(region.len);
                    }
                    self.place = self.place.saturating_add(region.len);
                }
                (Piece::Copy(region), Some(hasher)) => {
                    let file = self.source(region.shard)?;
                    let mut left = region.len;
                    let mut from = region.offset;
                    let mut bytes = Vec::new();
                    while left > 0 {
                        bytes.resize(usize::try_from(left).unwrap_or(MOVE_BYTES).min(MOVE_BYTES), 0);
                        file.read_exact_at(&mut bytes, from).map_err(self.at("reading a source of"))?;
                        hasher.update(&bytes);
                        self.put(&bytes)?;
                        from = from.saturating_add(bytes.len() as u64);
                        left = left.saturating_sub(bytes.len() as u64);
                    }
                }
                (Piece::Make(made), _) => {
                    self.flush()?;
                    let mut files = BTreeMap::new();
                    for (region, _) in &made.sources {
                        files.insert(region.shard, Arc::new(self.work.sources.open(region.shard)?));
                    }
                    let open = |shard| files.get(&shard).cloned().ok_or_else(|| io::ErrorKind::NotFound.into());
                    made.write::<Stop>(&open, &mut |bytes| self.put(bytes).map_err(Stop::Error)).map_err(|stop| {
                        match stop {
                            Stop::Io(error) => self.at("reading a source of")(error),
                            Stop::Error(error) => error,
                        }
                    })?;
                }
            }
        }
        if let (Some(hasher), Ok(mut hashes)) = (hasher, self.work.hashes.lock()) {
            hashes.insert(tensor.name.clone(), hasher.finalize().to_hex().to_string());
        }
        Ok(())
    }

    fn at(&self, doing: &'static str) -> impl FnOnce(io::Error) -> Error {
        Error::io(self.path.display().to_string(), doing)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if self.work.stop.load(Ordering::Relaxed) {
            return Err(self.work.cancelled());
        }
        self.work.disk.write_at(self.to, bytes, self.place).map_err(self.at("writing"))?;
        self.place = self.place.saturating_add(bytes.len() as u64);
        self.work.done.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        Ok(())
    }

    fn source(&mut self, shard: u32) -> Result<Arc<File>> {
        match &self.open {
            Some((number, file)) if *number == shard => Ok(Arc::clone(file)),
            _ => {
                let file = Arc::new(self.work.sources.open(shard)?);
                self.open = Some((shard, Arc::clone(&file)));
                Ok(file)
            }
        }
    }

    fn flush(&mut self) -> Result<()> {
        let Some((shard, from, len, to)) = self.pending.take() else { return Ok(()) };
        let file = self.source(shard)?;
        self.work.copy(&file, from, self.to, to, len, self.path)
    }
}

enum Stop {
    Io(io::Error),
    Error(Error),
}

impl From<io::Error> for Stop {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}
