//! The file system as the store sees it: paths are relative to one folder, with `/` between components, and `""` is that
//! folder. [`real::RealFs`] is the machine's; [`memory::MemoryFs`] is for tests: it loses what was not synced and fails
//! where it is told.

pub mod memory;
pub mod real;

use std::io;

/// What lies at a path. Symbolic links are never followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// A regular file and its bytes.
    File(u64),
    /// A folder.
    Folder,
    /// Something else: a link, a pipe, a device.
    Other,
}

/// A file that was just created.
pub trait NewFile {
    /// Appends.
    ///
    /// # Errors
    /// Of the operating system.
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()>;
    /// Makes the content durable; the name is durable only once its folder is synced.
    ///
    /// # Errors
    /// Of the operating system.
    fn sync(&mut self) -> io::Result<()>;
}

/// What the store needs of a file system. No path may lead out of the folder, by `..` or by a link.
pub trait FileSystem {
    /// Held as long as the lock is.
    type Lock;

    /// The folder's path, for messages.
    fn root(&self) -> String;
    /// What lies at `path`; `None` where nothing does.
    ///
    /// # Errors
    /// Of the operating system.
    fn entry(&self, path: &str) -> io::Result<Option<Entry>>;
    /// Gives the content of a regular file to `each`, piece by piece.
    ///
    /// # Errors
    /// Of the operating system; `InvalidInput` where it is not a regular file.
    fn read(&self, path: &str, each: &mut dyn FnMut(&[u8])) -> io::Result<()>;
    /// Creates a file; it is an error if anything is there.
    ///
    /// # Errors
    /// Of the operating system.
    fn create_file(&self, path: &str) -> io::Result<Box<dyn NewFile + '_>>;
    /// Creates a folder; it is an error if anything is there.
    ///
    /// # Errors
    /// Of the operating system.
    fn create_folder(&self, path: &str) -> io::Result<()>;
    /// Renames within one folder, atomically, over what is there.
    ///
    /// # Errors
    /// Of the operating system.
    fn rename(&self, from: &str, to: &str) -> io::Result<()>;
    /// Removes a file or a link.
    ///
    /// # Errors
    /// Of the operating system.
    fn remove_file(&self, path: &str) -> io::Result<()>;
    /// Removes an empty folder.
    ///
    /// # Errors
    /// Of the operating system.
    fn remove_folder(&self, path: &str) -> io::Result<()>;
    /// Makes the names in a folder durable.
    ///
    /// # Errors
    /// Of the operating system.
    fn sync_folder(&self, path: &str) -> io::Result<()>;
    /// Takes the writers' lock on a file, made where it is missing; `None` where another holds it.
    ///
    /// # Errors
    /// Of the operating system.
    fn try_lock(&self, path: &str) -> io::Result<Option<Self::Lock>>;
}

/// Creates a file with this content and makes the content durable.
pub(crate) fn write_synced(files: &impl FileSystem, path: &str, bytes: &[u8]) -> io::Result<()> {
    let mut file = files.create_file(path)?;
    file.write_all(bytes)?;
    file.sync()
}

/// Replaces `path` by way of `temporary` in the same folder: others see the old content or the new.
pub(crate) fn replace(files: &impl FileSystem, temporary: &str, path: &str, bytes: &[u8]) -> io::Result<()> {
    write_synced(files, temporary, bytes)?;
    files.rename(temporary, path)
}

/// The folder of a path.
pub(crate) fn parent(path: &str) -> &str {
    path.rsplit_once('/').map_or("", |(parent, _)| parent)
}

impl<F: FileSystem> FileSystem for &F {
    type Lock = F::Lock;

    fn root(&self) -> String {
        (**self).root()
    }
    fn entry(&self, path: &str) -> io::Result<Option<Entry>> {
        (**self).entry(path)
    }
    fn read(&self, path: &str, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        (**self).read(path, each)
    }
    fn create_file(&self, path: &str) -> io::Result<Box<dyn NewFile + '_>> {
        (**self).create_file(path)
    }
    fn create_folder(&self, path: &str) -> io::Result<()> {
        (**self).create_folder(path)
    }
    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        (**self).rename(from, to)
    }
    fn remove_file(&self, path: &str) -> io::Result<()> {
        (**self).remove_file(path)
    }
    fn remove_folder(&self, path: &str) -> io::Result<()> {
        (**self).remove_folder(path)
    }
    fn sync_folder(&self, path: &str) -> io::Result<()> {
        (**self).sync_folder(path)
    }
    fn try_lock(&self, path: &str) -> io::Result<Option<Self::Lock>> {
        (**self).try_lock(path)
    }
}
