//! The file system as surgery sees it: whole files are never held, bytes are moved by the kernel where it can.
//! Tests put one in its place that fails, or stops, at any operation.

use std::fs::File;
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::fs::{FlockOperation, Mode, OFlags, RenameFlags};
use rustix::io::Errno;

use crate::limits::MOVE_BYTES;

/// What surgery needs of a file system.
pub trait Disk: Sync {
    /// Creates a folder; an error where something is there.
    ///
    /// # Errors
    /// Of the operating system, as of all that follow.
    fn create_folder(&self, path: &Path) -> io::Result<()>;
    /// Creates a file for reading and writing, its mode that of the umask; an error where something is there.
    ///
    /// # Errors
    /// Of the operating system.
    fn create_file(&self, path: &Path) -> io::Result<File>;
    /// Moves bytes from one file to another.
    ///
    /// # Errors
    /// Of the operating system; `UnexpectedEof` where the source ends early.
    fn copy(&self, from: &File, from_at: u64, to: &File, to_at: u64, len: u64) -> io::Result<()>;
    /// Writes bytes.
    ///
    /// # Errors
    /// Of the operating system.
    fn write_at(&self, file: &File, bytes: &[u8], at: u64) -> io::Result<()>;
    /// Makes the content of a file durable.
    ///
    /// # Errors
    /// Of the operating system.
    fn sync(&self, file: &File) -> io::Result<()>;
    /// Makes the names of a folder durable.
    ///
    /// # Errors
    /// Of the operating system.
    fn sync_folder(&self, path: &Path) -> io::Result<()>;
    /// Makes a file that shares the bytes of another (a reflink), or its name (a hard link).
    ///
    /// # Errors
    /// Of the operating system.
    fn link(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Makes a symbolic link.
    ///
    /// # Errors
    /// Of the operating system.
    fn symlink(&self, content: &Path, at: &Path) -> io::Result<()>;
    /// Renames; an error where something is there.
    ///
    /// # Errors
    /// Of the operating system.
    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()>;
    /// Exchanges two folders, atomically.
    ///
    /// # Errors
    /// Of the operating system.
    fn exchange(&self, left: &Path, right: &Path) -> io::Result<()>;
    /// Removes a folder and what is in it.
    ///
    /// # Errors
    /// Of the operating system.
    fn remove_tree(&self, path: &Path) -> io::Result<()>;
}

/// The machine's.
#[derive(Debug, Default)]
pub struct RealDisk {
    /// Whether `copy_file_range` was refused once.
    buffered: AtomicBool,
}

impl RealDisk {
    /// One that moves bytes through a buffer, as where the kernel cannot.
    #[cfg(test)]
    pub(super) fn buffered() -> Self {
        Self { buffered: AtomicBool::new(true) }
    }
}

impl Disk for RealDisk {
    fn create_folder(&self, path: &Path) -> io::Result<()> {
        std::fs::create_dir(path)
    }

    fn create_file(&self, path: &Path) -> io::Result<File> {
        std::fs::OpenOptions::new().read(true).write(true).create_new(true).open(path)
    }

    fn copy(&self, from: &File, from_at: u64, to: &File, to_at: u64, len: u64) -> io::Result<()> {
        let (mut from_at, mut to_at, mut left) = (from_at, to_at, len);
        while left > 0 && !self.buffered.load(Ordering::Relaxed) {
            let wanted = usize::try_from(left).unwrap_or(usize::MAX);
            // The kernel moves both offsets on.
            match rustix::fs::copy_file_range(from.as_fd(), Some(&mut from_at), to.as_fd(), Some(&mut to_at), wanted) {
                Ok(0) => return Err(io::ErrorKind::UnexpectedEof.into()),
                Ok(moved) => left = left.saturating_sub(moved as u64),
                Err(Errno::INTR) => {}
                Err(Errno::XDEV | Errno::INVAL | Errno::NOSYS | Errno::OPNOTSUPP | Errno::PERM) => {
                    self.buffered.store(true, Ordering::Relaxed);
                }
                Err(error) => return Err(error.into()),
            }
        }
        let mut buffer = Vec::new();
        while left > 0 {
            buffer.resize(usize::try_from(left).unwrap_or(MOVE_BYTES).min(MOVE_BYTES), 0);
            from.read_exact_at(&mut buffer, from_at)?;
            to.write_all_at(&buffer, to_at)?;
            let moved = buffer.len() as u64;
            (from_at, to_at) = (from_at.saturating_add(moved), to_at.saturating_add(moved));
            left = left.saturating_sub(moved);
        }
        Ok(())
    }

    fn write_at(&self, file: &File, bytes: &[u8], at: u64) -> io::Result<()> {
        file.write_all_at(bytes, at)
    }

    fn sync(&self, file: &File) -> io::Result<()> {
        file.sync_all()
    }

    fn sync_folder(&self, path: &Path) -> io::Result<()> {
        Ok(rustix::fs::fsync(folder(path)?)?)
    }

    fn link(&self, from: &Path, to: &Path) -> io::Result<()> {
        let source = File::open(from)?;
        let clone = self.create_file(to)?;
        if rustix::fs::ioctl_ficlone(&clone, &source).is_ok() {
            return Ok(());
        }
        std::fs::remove_file(to)?;
        std::fs::hard_link(from, to)
    }

    fn symlink(&self, content: &Path, at: &Path) -> io::Result<()> {
        std::os::unix::fs::symlink(content, at)
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        match rustix::fs::renameat_with(rustix::fs::CWD, from, rustix::fs::CWD, to, RenameFlags::NOREPLACE) {
            // Not every file system has it. Over a folder with files in it no rename goes.
            Err(Errno::INVAL | Errno::NOSYS) if std::fs::symlink_metadata(to).is_err() => std::fs::rename(from, to),
            done => Ok(done?),
        }
    }

    fn exchange(&self, left: &Path, right: &Path) -> io::Result<()> {
        Ok(rustix::fs::renameat_with(rustix::fs::CWD, left, rustix::fs::CWD, right, RenameFlags::EXCHANGE)?)
    }

    fn remove_tree(&self, path: &Path) -> io::Result<()> {
        std::fs::remove_dir_all(path)
    }
}

fn folder(path: &Path) -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW;
    Ok(File::from(rustix::fs::open(path, flags, Mode::empty())?))
}

/// Locks a folder for as long as the file is open; `None` where another process has the lock.
pub(super) fn lock(path: &Path) -> io::Result<Option<File>> {
    let folder = folder(path)?;
    match rustix::fs::flock(&folder, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(folder)),
        Err(Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}
