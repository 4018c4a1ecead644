//! The manifest of a run folder: which files it has, as JSON that names every file's path, size and BLAKE3 hash, and a
//! checksum of itself. Whatever a manifest says is checked before it is believed: a name or a path can only be
//! components of `[A-Za-z0-9._-]` that do not start with a dot.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;

use serde::de::{self, Deserializer, MapAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::limits::{MAX_COMPONENT_BYTES, MAX_FILE_DEPTH, MAX_FILE_NAME_BYTES, MAX_FILES};

/// The commit point.
pub(super) const MANIFEST: &str = "manifest.json";
const FORMAT: &str = "moses-run";
const VERSION: u64 = 1;

/// What the manifest says of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileInfo {
    /// Where it lies in the folder.
    pub path: String,
    /// Its size.
    pub bytes: u64,
    /// The hash of its content, as hexadecimal digits.
    pub blake3: String,
}

/// The files of a run folder at one generation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Manifest {
    pub(super) generation: u64,
    pub(super) files: BTreeMap<String, FileInfo>,
}

/// Why a manifest cannot be used.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Refused {
    /// It is of a later version.
    Version(u64),
    /// It breaks a rule.
    Problem(String),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Document {
    format: String,
    version: u64,
    generation: u64,
    files: Files,
    checksum: String,
}

#[derive(Deserialize)]
struct Head {
    format: String,
    version: u64,
}

#[derive(Serialize)]
#[serde(transparent)]
struct Files(BTreeMap<String, FileInfo>);

impl<'de> Deserialize<'de> for Files {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct FilesVisitor;
        impl<'de> Visitor<'de> for FilesVisitor {
            type Value = Files;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object of files")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Files, A::Error> {
                let mut files = BTreeMap::new();
                while let Some(name) = map.next_key::<String>()? {
                    if files.len() >= MAX_FILES {
                        return Err(de::Error::custom(format!("more than {MAX_FILES} files")));
                    }
                    let info = map.next_value()?;
                    if files.insert(name.clone(), info).is_some() {
                        return Err(de::Error::custom(format!("{name:?} is there twice")));
                    }
                }
                Ok(Files(files))
            }
        }
        deserializer.deserialize_map(FilesVisitor)
    }
}

/// What is wrong with a name or a path; `None` where nothing is.
pub(super) fn name_problem(name: &str) -> Option<&'static str> {
    if name.is_empty() || name.len() > MAX_FILE_NAME_BYTES {
        return Some("it must have 1 to 512 bytes");
    }
    if name.split('/').count() > MAX_FILE_DEPTH {
        return Some("it goes down more than 8 folders");
    }
    for component in name.split('/') {
        if component.is_empty() || component.len() > MAX_COMPONENT_BYTES {
            return Some("each part between slashes must have 1 to 200 bytes");
        }
        if component.starts_with('.') {
            return Some("no part may start with a dot");
        }
        if !component.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(&byte)) {
            return Some("parts are made of the letters A-Z and a-z, digits, dots, underscores and hyphens");
        }
    }
    if name == MANIFEST {
        return Some("the manifest has it");
    }
    None
}

impl Manifest {
    /// The manifest as bytes: JSON for people, one field a line.
    pub(super) fn to_bytes(&self) -> Vec<u8> {
        let document = Document {
            format: FORMAT.to_owned(),
            version: VERSION,
            generation: self.generation,
            files: Files(self.files.clone()),
            checksum: self.checksum(),
        };
        // Writing these types as JSON does not fail.
        let mut bytes = serde_json::to_vec_pretty(&document).unwrap_or_default();
        bytes.push(b'\n');
        bytes
    }

    pub(super) fn from_bytes(bytes: &[u8]) -> Result<Self, Refused> {
        let problem = |problem: String| Refused::Problem(problem);
        let head: Head = serde_json::from_slice(bytes).map_err(|error| problem(error.to_string()))?;
        if head.format != FORMAT {
            return Err(problem(format!("its format is {:?} where {FORMAT:?} must be", head.format)));
        }
        if head.version > VERSION {
            return Err(Refused::Version(head.version));
        }
        if head.version == 0 {
            return Err(problem("its version is 0".to_owned()));
        }
        let document: Document = serde_json::from_slice(bytes).map_err(|error| problem(error.to_string()))?;
        let manifest = Self { generation: document.generation, files: document.files.0 };
        manifest.check().map_err(problem)?;
        if manifest.checksum() != document.checksum {
            return Err(problem("its checksum is wrong, so it was changed".to_owned()));
        }
        Ok(manifest)
    }

    /// The rules that hold in every manifest.
    pub(super) fn check(&self) -> Result<(), String> {
        if self.files.len() > MAX_FILES {
            return Err(format!("more than {MAX_FILES} files"));
        }
        let mut paths = BTreeSet::new();
        for (name, info) in &self.files {
            for name in [name, &info.path] {
                if let Some(rule) = name_problem(name) {
                    return Err(format!("the file name {name:?} is not usable: {rule}"));
                }
            }
            if !crate::hash::is_hex(&info.blake3) {
                return Err(format!("the hash of {name:?} is not 64 hexadecimal digits"));
            }
            if !paths.insert(info.path.as_str()) {
                return Err(format!("two files lie at {:?}", info.path));
            }
        }
        for path in &paths {
            let mut above = super::parent(path);
            while !above.is_empty() {
                if paths.contains(above) {
                    return Err(format!("{above:?} is a file and a folder"));
                }
                above = super::parent(above);
            }
        }
        Ok(())
    }

    /// Whether a file lies at this path.
    pub(super) fn has_path(&self, path: &str) -> bool {
        self.files.values().any(|info| info.path == path)
    }

    fn checksum(&self) -> String {
        let mut hasher = blake3::Hasher::new_derive_key("moses 1 manifest");
        hasher.update(&self.generation.to_le_bytes());
        for (name, info) in &self.files {
            for text in [name, &info.path, &info.blake3] {
                hasher.update(&(text.len() as u64).to_le_bytes());
                hasher.update(text.as_bytes());
            }
            hasher.update(&info.bytes.to_le_bytes());
        }
        hasher.finalize().to_hex().to_string()
    }
}
