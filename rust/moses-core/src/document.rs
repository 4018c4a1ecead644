//! A JSON object whose keys keep their order and whose values keep their text: a config of which three numbers change
//! must stay, in all else, what it was.

use std::fmt;

use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::Value;
use serde_json::value::RawValue;

/// The object.
#[derive(Debug, Clone, Default)]
pub struct Document(Vec<(String, Box<RawValue>)>);

impl Document {
    /// Reads an object; a key that is there twice is an error.
    ///
    /// # Errors
    /// What is wrong, for a message.
    pub fn parse(bytes: &[u8]) -> Result<Self, String> {
        let document: Self = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
        // A value is kept as text: that its depth is one that every reader takes is checked here.
        for (_, value) in &document.0 {
            serde_json::from_str::<Value>(value.get()).map_err(|error| error.to_string())?;
        }
        Ok(document)
    }

    /// The value of a key.
    #[must_use]
    pub fn get(&self, key: &str) -> Option<Value> {
        let (_, value) = self.0.iter().find(|(name, _)| name == key)?;
        serde_json::from_str(value.get()).ok()
    }

    /// The value of a key, where it is a number from 0.
    #[must_use]
    pub fn count(&self, key: &str) -> Option<u64> {
        self.get(key)?.as_u64()
    }

    /// The value of a key, where it is a text.
    #[must_use]
    pub fn text(&self, key: &str) -> Option<String> {
        Some(self.get(key)?.as_str()?.to_owned())
    }

    /// Whether the key is there.
    #[must_use]
    pub fn has(&self, key: &str) -> bool {
        self.0.iter().any(|(name, _)| name == key)
    }

    /// Whether a value's text has this in it.
    #[must_use]
    pub fn mentions(&self, key: &str, text: &str) -> bool {
        self.0.iter().any(|(name, value)| name == key && value.get().contains(text))
    }

    /// Sets a key: in its place where it is there, else at the end.
    pub fn set(&mut self, key: &str, value: &Value) {
        let Ok(raw) = RawValue::from_string(value.to_string()) else { return };
        match self.0.iter_mut().find(|(name, _)| name == key) {
            Some((_, old)) => *old = raw,
            None => self.0.push((key.to_owned(), raw)),
        }
    }

    /// Takes a key out.
    pub fn remove(&mut self, key: &str) {
        self.0.retain(|(name, _)| name != key);
    }

    /// The text, indented by two spaces, with a line end.
    #[must_use]
    pub fn to_text(&self) -> String {
        let lines: Vec<String> =
            self.0.iter().map(|(key, value)| format!("  {}: {}", Value::from(key.as_str()), value.get())).collect();
        format!("{{\n{}\n}}\n", lines.join(",\n"))
    }
}

impl<'de> Deserialize<'de> for Document {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Ordered;
        impl<'de> Visitor<'de> for Ordered {
            type Value = Document;

            fn expecting(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
                formatter.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Document, A::Error> {
                let mut fields: Vec<(String, Box<RawValue>)> = Vec::new();
                let mut seen = std::collections::BTreeSet::new();
                while let Some((key, value)) = map.next_entry::<String, Box<RawValue>>()? {
                    if !seen.insert(key.clone()) {
                        return Err(de::Error::custom(format!("{key:?} is there twice")));
                    }
                    fields.push((key, value));
                }
                Ok(Document(fields))
            }
        }
        deserializer.deserialize_map(Ordered)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn order_and_text_stay() {
        let mut document = Document::parse(br#"{"b": 1e-06, "a": {"z": [1,  2]}, "n": 4}"#).unwrap();
        document.set("n", &Value::from(2));
        document.set("m", &Value::from("x"));
        document.remove("q");
        assert_eq!(
            document.to_text(),
            "{\n  \"b\": 1e-06,\n  \"a\": {\"z\": [1,  2]},\n  \"n\": 2,\n  \"m\": \"x\"\n}\n"
        );
        assert_eq!(document.count("n"), Some(2));
        assert_eq!(document.text("m").as_deref(), Some("x"));
    }

    #[test]
    fn what_is_no_object_or_has_a_key_twice_is_refused() {
        for wrong in ["", "[]", "1", r#"{"a":1,"a":2}"#, r#"{"a":1"#, &format!("{{\"a\":{}", "[".repeat(100_000))] {
            assert!(Document::parse(wrong.as_bytes()).is_err(), "{wrong}");
        }
        let deep = format!("{{\"a\":{}{}}}", "[".repeat(1000), "]".repeat(1000));
        assert!(Document::parse(deep.as_bytes()).is_err());
    }
}
