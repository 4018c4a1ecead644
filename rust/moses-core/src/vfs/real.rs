//! The machine's file system under one folder, which is held open: every path is walked from it component by component
//! without following links, so nothing outside is reached even while another process moves things about.

use std::fs::File;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, fsync, mkdirat, openat, renameat, statat, unlinkat};

use super::{Entry, FileSystem, NewFile, parent, replace};

const PIECE_BYTES: usize = 1 << 18;
const FOLDER: OFlags = OFlags::DIRECTORY.union(OFlags::RDONLY).union(OFlags::CLOEXEC);

/// A folder of the machine.
#[derive(Debug)]
pub struct RealFs {
    root: OwnedFd,
    path: PathBuf,
}

impl RealFs {
    /// The folder at `path`; only here links are followed, since the user named it.
    ///
    /// # Errors
    /// Of the operating system.
    pub fn open(path: &Path) -> io::Result<Self> {
        let root = rustix::fs::open(path, FOLDER, Mode::empty())?;
        Ok(Self { root, path: std::path::absolute(path)? })
    }

    /// The same, created with its parents where it is missing.
    ///
    /// # Errors
    /// Of the operating system.
    pub fn create(path: &Path) -> io::Result<Self> {
        if !path.is_dir() {
            std::fs::create_dir_all(path)?;
            let absolute = std::path::absolute(path)?;
            // The folder's own name must be durable before anything in it is.
            if let Some(parent) = absolute.parent() {
                fsync(rustix::fs::open(parent, FOLDER, Mode::empty())?)?;
            }
        }
        Self::open(path)
    }

    /// The folder's path, absolute: it stays right when the process moves to another folder.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn folder(&self, path: &str) -> io::Result<OwnedFd> {
        let mut folder = openat(&self.root, ".", FOLDER, Mode::empty())?;
        for component in path.split('/').filter(|component| !component.is_empty()) {
            if component == ".." {
                return Err(io::Error::from(io::ErrorKind::InvalidInput));
            }
            folder = openat(&folder, component, FOLDER | OFlags::NOFOLLOW, Mode::empty())?;
        }
        Ok(folder)
    }

    /// The folder that holds `path` and the last component.
    fn split<'a>(&self, path: &'a str) -> io::Result<(OwnedFd, &'a str)> {
        let name = path.rsplit_once('/').map_or(path, |(_, name)| name);
        if matches!(name, "" | "." | "..") {
            return Err(io::Error::from(io::ErrorKind::InvalidInput));
        }
        Ok((self.folder(parent(path))?, name))
    }

    fn open_file(&self, path: &str, flags: OFlags) -> io::Result<File> {
        let (folder, name) = self.split(path)?;
        let mode = Mode::from_raw_mode(0o644);
        Ok(File::from(openat(&folder, name, flags | OFlags::NOFOLLOW | OFlags::CLOEXEC, mode)?))
    }
}

impl NewFile for File {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        io::Write::write_all(self, bytes)?;
        self.flush()
    }

    fn sync(&mut self) -> io::Result<()> {
        self.sync_all()
    }
}

impl FileSystem for RealFs {
    type Lock = File;

    fn root(&self) -> String {
        self.path.display().to_string()
    }

    fn entry(&self, path: &str) -> io::Result<Option<Entry>> {
        let found = self.split(path).and_then(|(folder, name)| Ok(statat(&folder, name, AtFlags::SYMLINK_NOFOLLOW)?));
        match found {
            Ok(stat) => Ok(Some(match FileType::from_raw_mode(stat.st_mode) {
                FileType::RegularFile => Entry::File(u64::try_from(stat.st_size).unwrap_or(0)),
                FileType::Directory => Entry::Folder,
                _ => Entry::Other,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&self, path: &str, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        // NONBLOCK: opening a pipe must not wait for a writer.
        let mut file = self.open_file(path, OFlags::RDONLY | OFlags::NONBLOCK)?;
        if !file.metadata()?.is_file() {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
        }
        let mut piece = vec![0; PIECE_BYTES];
        loop {
            match file.read(&mut piece) {
                Ok(0) => return Ok(()),
                Ok(count) => each(piece.get(..count).unwrap_or_default()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn create_file(&self, path: &str) -> io::Result<Box<dyn NewFile + '_>> {
        Ok(Box::new(self.open_file(path, OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL)?))
    }

    fn create_folder(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.split(path)?;
        Ok(mkdirat(&folder, name, Mode::from_raw_mode(0o755))?)
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        let ((from_folder, from), (to_folder, to)) = (self.split(from)?, self.split(to)?);
        Ok(renameat(&from_folder, from, &to_folder, to)?)
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.split(path)?;
        Ok(unlinkat(&folder, name, AtFlags::empty())?)
    }

    fn remove_folder(&self, path: &str) -> io::Result<()> {
        let (folder, name) = self.split(path)?;
        Ok(unlinkat(&folder, name, AtFlags::REMOVEDIR)?)
    }

    fn sync_folder(&self, path: &str) -> io::Result<()> {
        Ok(fsync(self.folder(path)?)?)
    }

    fn try_lock(&self, path: &str) -> io::Result<Option<File>> {
        let file = self.open_file(path, OFlags::RDWR | OFlags::CREATE)?;
        match file.try_lock() {
            Ok(()) => Ok(Some(file)),
            Err(std::fs::TryLockError::WouldBlock) => Ok(None),
            Err(std::fs::TryLockError::Error(error)) => Err(error),
        }
    }
}

/// Replaces the file at `path`: whatever happens, the old content or the new is there. Mode 0644 less the umask.
///
/// # Errors
/// Of the operating system; then the old content is there (if only the last sync failed, the new one may be).
pub fn atomic_write(path: &Path, bytes: &[u8]) -> io::Result<()> {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let name = path.file_name().and_then(|name| name.to_str());
    let name =
        name.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "the path does not end in a file name"))?;
    let folder = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let files = RealFs::open(folder)?;
    let kept: String = name.chars().take(40).collect();
    loop {
        // A process that was killed may have had our number and left its temporary file.
        let count = COUNT.fetch_add(1, Ordering::Relaxed);
        let temporary = format!(".{kept}.{}-{count}.tmp", std::process::id());
        match replace(&files, &temporary, name, bytes) {
            Ok(()) => return files.sync_folder(""),
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
            Err(error) => {
                // The first error is the one to tell; what cannot be removed does no harm.
                let _ = files.remove_file(&temporary);
                return Err(error);
            }
        }
    }
}
