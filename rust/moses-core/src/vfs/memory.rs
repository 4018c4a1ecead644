//! A file system in memory, for tests, that is as unkind as POSIX allows: content that was not synced and names whose
//! folder was not synced may be lost at a crash, in any combination, and unsynced content may be torn. Any operation
//! can be made to fail, once or from then on.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::io;
use std::rc::Rc;

use super::{Entry, FileSystem, NewFile, parent};

/// What happens at one operation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fault {
    /// Nothing ever fails.
    None,
    /// Operation `n` (from 0) fails, the others do not.
    FailAt(u64),
    /// Operation `n` and all after it fail, reads too: the machine has stopped.
    StopAt(u64),
}

/// What a crash leaves of what was not synced.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Survival {
    /// None of it.
    Nothing,
    /// All of it.
    Everything,
    /// Each change by a coin, thrown from this seed; content may be cut or torn.
    Chance(u64),
}

/// A change of names in one folder that was not synced yet; a rename is one change.
type Change = Vec<(String, Option<usize>)>;

#[derive(Debug, Clone)]
enum Node {
    File { content: Vec<u8>, synced: Vec<u8> },
    Folder { synced: BTreeMap<String, usize>, pending: Vec<Change> },
    Link,
}

impl Node {
    fn folder() -> Self {
        Self::Folder { synced: BTreeMap::new(), pending: Vec::new() }
    }
}

/// The file system; node 0 is the root.
#[derive(Debug)]
pub struct MemoryFs {
    nodes: RefCell<Vec<Node>>,
    operations: Cell<u64>,
    fault: Cell<Fault>,
    lock: Rc<()>,
}

impl Default for MemoryFs {
    fn default() -> Self {
        Self::from_nodes(vec![Node::folder()])
    }
}

fn kind(kind: io::ErrorKind) -> io::Error {
    io::Error::from(kind)
}

fn entries(node: Option<&Node>) -> io::Result<BTreeMap<String, usize>> {
    let Some(Node::Folder { synced, pending }) = node else { return Err(kind(io::ErrorKind::NotADirectory)) };
    let mut names = synced.clone();
    pending.iter().for_each(|change| apply(&mut names, change));
    Ok(names)
}

fn apply(names: &mut BTreeMap<String, usize>, change: &Change) {
    for (name, node) in change {
        match node {
            Some(node) => names.insert(name.clone(), *node),
            None => names.remove(name),
        };
    }
}

fn last(path: &str) -> String {
    path.rsplit_once('/').map_or(path, |(_, name)| name).to_owned()
}

impl MemoryFs {
    fn from_nodes(nodes: Vec<Node>) -> Self {
        Self { nodes: RefCell::new(nodes), operations: Cell::new(0), fault: Cell::new(Fault::None), lock: Rc::new(()) }
    }

    /// Counts operations from 0 again and fails as told.
    pub fn set_fault(&self, fault: Fault) {
        self.operations.set(0);
        self.fault.set(fault);
    }

    /// How many changing operations there were since the fault was set.
    #[must_use]
    pub fn operations(&self) -> u64 {
        self.operations.get()
    }

    /// Everything that is there now: files with their content, folders (ending with `/`) with none.
    #[must_use]
    pub fn tree(&self) -> BTreeMap<String, Vec<u8>> {
        fn walk(nodes: &[Node], at: usize, prefix: &str, tree: &mut BTreeMap<String, Vec<u8>>) {
            for (name, child) in entries(nodes.get(at)).unwrap_or_default() {
                match nodes.get(child) {
                    Some(Node::File { content, .. }) => {
                        tree.insert(format!("{prefix}{name}"), content.clone());
                    }
                    Some(Node::Folder { .. }) => {
                        tree.insert(format!("{prefix}{name}/"), Vec::new());
                        walk(nodes, child, &format!("{prefix}{name}/"), tree);
                    }
                    _ => {}
                }
            }
        }
        let mut tree = BTreeMap::new();
        walk(&self.nodes.borrow(), 0, "", &mut tree);
        tree
    }

    /// Puts a symbolic link at `path`, durably.
    pub fn put_link(&self, path: &str) {
        let _ = self.add(path, Node::Link).map(|_| self.sync_names(path));
    }

    fn sync_names(&self, path: &str) {
        if let Ok(at) = self.find(parent(path))
            && let Some(Node::Folder { synced, pending }) = self.nodes.borrow_mut().get_mut(at)
        {
            pending.drain(..).for_each(|change| apply(synced, &change));
        }
    }

    /// The file system that a machine finds after a crash now.
    #[must_use]
    pub fn after_crash(&self, survival: Survival) -> Self {
        let mut dice = match survival {
            Survival::Chance(seed) => seed | 1,
            _ => 1,
        };
        let mut throw = |sides: u64| {
            dice ^= dice << 13;
            dice ^= dice >> 7;
            dice ^= dice << 17;
            match survival {
                Survival::Nothing => 0,
                Survival::Everything => 1,
                Survival::Chance(_) => dice.checked_rem(sides).unwrap_or(0),
            }
        };
        let survive = |node: &Node| match node {
            Node::Link => Node::Link,
            Node::File { content, synced } => {
                let kept = match if content == synced { 1 } else { throw(4) } {
                    0 => synced.clone(),
                    1 => content.clone(),
                    2 => content.iter().take(content.len() / 2).copied().collect(),
                    // The length arrived and half of the content did not.
                    _ => content
                        .iter()
                        .enumerate()
                        .map(|(at, &byte)| if at < content.len() / 2 { byte } else { 0 })
                        .collect(),
                };
                Node::File { content: kept.clone(), synced: kept }
            }
            Node::Folder { synced, pending } => {
                let mut names = synced.clone();
                for change in pending {
                    if throw(2) == 1 {
                        apply(&mut names, change);
                    }
                }
                Node::Folder { synced: names, pending: Vec::new() }
            }
        };
        Self::from_nodes(self.nodes.borrow().iter().map(survive).collect())
    }

    /// Counts a changing operation; the error, where it is to fail.
    fn step(&self) -> io::Result<()> {
        let now = self.operations.get();
        self.operations.set(now.saturating_add(1));
        match self.fault.get() {
            Fault::FailAt(at) if now == at => Err(io::Error::other("injected fault")),
            Fault::StopAt(at) if now >= at => Err(io::Error::other("the machine has stopped")),
            _ => Ok(()),
        }
    }

    fn running(&self) -> io::Result<()> {
        match self.fault.get() {
            Fault::StopAt(at) if self.operations.get() > at => Err(io::Error::other("the machine has stopped")),
            _ => Ok(()),
        }
    }

    fn find(&self, path: &str) -> io::Result<usize> {
        let nodes = self.nodes.borrow();
        path.split('/').filter(|component| !component.is_empty()).try_fold(0, |at, component| {
            let names = entries(nodes.get(at))?;
            names.get(component).copied().ok_or_else(|| kind(io::ErrorKind::NotFound))
        })
    }

    fn add(&self, path: &str, node: Node) -> io::Result<usize> {
        if self.find(path).is_ok() {
            return Err(kind(io::ErrorKind::AlreadyExists));
        }
        let added = self.nodes.borrow().len();
        self.nodes.borrow_mut().push(node);
        self.change(parent(path), vec![(last(path), Some(added))])?;
        Ok(added)
    }

    fn change(&self, folder: &str, change: Change) -> io::Result<()> {
        let at = self.find(folder)?;
        match self.nodes.borrow_mut().get_mut(at) {
            Some(Node::Folder { pending, .. }) => {
                pending.push(change);
                Ok(())
            }
            _ => Err(kind(io::ErrorKind::NotADirectory)),
        }
    }
}

struct MemoryFile<'a> {
    files: &'a MemoryFs,
    node: usize,
}

impl NewFile for MemoryFile<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        let done = self.files.step();
        // A write that fails may have written a part.
        let written = if done.is_ok() { bytes.len() } else { bytes.len() / 2 };
        if let Some(Node::File { content, .. }) = self.files.nodes.borrow_mut().get_mut(self.node) {
            content.extend(bytes.iter().take(written));
        }
        done
    }

    fn sync(&mut self) -> io::Result<()> {
        self.files.step()?;
        if let Some(Node::File { content, synced }) = self.files.nodes.borrow_mut().get_mut(self.node) {
            synced.clone_from(content);
        }
        Ok(())
    }
}

impl FileSystem for MemoryFs {
    type Lock = Rc<()>;

    fn root(&self) -> String {
        "memory".to_owned()
    }

    fn entry(&self, path: &str) -> io::Result<Option<Entry>> {
        self.running()?;
        match self.find(path) {
            Ok(at) => Ok(self.nodes.borrow().get(at).map(|node| match node {
                Node::File { content, .. } => Entry::File(content.len() as u64),
                Node::Folder { .. } => Entry::Folder,
                Node::Link => Entry::Other,
            })),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    fn read(&self, path: &str, each: &mut dyn FnMut(&[u8])) -> io::Result<()> {
        self.running()?;
        let at = self.find(path)?;
        match self.nodes.borrow().get(at) {
            Some(Node::File { content, .. }) => {
                content.chunks(7).for_each(each);
                Ok(())
            }
            _ => Err(kind(io::ErrorKind::InvalidInput)),
        }
    }

    fn create_file(&self, path: &str) -> io::Result<Box<dyn NewFile + '_>> {
        self.step()?;
        let node = self.add(path, Node::File { content: Vec::new(), synced: Vec::new() })?;
        Ok(Box::new(MemoryFile { files: self, node }))
    }

    fn create_folder(&self, path: &str) -> io::Result<()> {
        self.step()?;
        self.add(path, Node::folder()).map(|_| ())
    }

    fn rename(&self, from: &str, to: &str) -> io::Result<()> {
        self.step()?;
        if parent(from) != parent(to) {
            return Err(kind(io::ErrorKind::Unsupported));
        }
        let node = self.find(from)?;
        self.change(parent(from), vec![(last(from), None), (last(to), Some(node))])
    }

    fn remove_file(&self, path: &str) -> io::Result<()> {
        self.step()?;
        let at = self.find(path)?;
        if matches!(self.nodes.borrow().get(at), Some(Node::Folder { .. })) {
            return Err(kind(io::ErrorKind::IsADirectory));
        }
        self.change(parent(path), vec![(last(path), None)])
    }

    fn remove_folder(&self, path: &str) -> io::Result<()> {
        self.step()?;
        let at = self.find(path)?;
        if !entries(self.nodes.borrow().get(at))?.is_empty() {
            return Err(kind(io::ErrorKind::DirectoryNotEmpty));
        }
        self.change(parent(path), vec![(last(path), None)])
    }

    fn sync_folder(&self, path: &str) -> io::Result<()> {
        self.step()?;
        let at = self.find(path)?;
        match self.nodes.borrow_mut().get_mut(at) {
            Some(Node::Folder { synced, pending }) => {
                pending.drain(..).for_each(|change| apply(synced, &change));
                Ok(())
            }
            _ => Err(kind(io::ErrorKind::NotADirectory)),
        }
    }

    fn try_lock(&self, _path: &str) -> io::Result<Option<Rc<()>>> {
        self.running()?;
        Ok((Rc::strong_count(&self.lock) == 1).then(|| Rc::clone(&self.lock)))
    }
}
