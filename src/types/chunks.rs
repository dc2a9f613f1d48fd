//! A sorted list whose entries are stored in chunks.
//!
//! `BTreeMap` is about as fast, but adds 5 KiB to the size of the program for each type of its entries.
//! This list adds about 1 KiB.

use std::slice;

/// The number of entries at which a chunk is split. An insertion or removal moves fewer entries than
/// this. A power of 2, because the memory of a chunk doubles when the chunk grows. With 64 or 256, a
/// list is slightly slower.
const CHUNK: usize = if cfg!(test) { 4 } else { 128 };

/// An entry of a list. The list sorts its entries by their keys, and has one entry for each key.
pub(crate) trait Entry {
    type Key: Ord;

    fn key(&self) -> Self::Key;
}

/// A sorted list.
///
/// Only the first chunk may be empty, and only if it is the only one: a list that often becomes empty
/// does not allocate its memory again.
#[derive(Debug)]
pub(crate) struct Chunks<E> {
    chunks: Vec<Vec<E>>,
    len: usize,
}

// Keep the functions that insert and remove out of line, because each inlined copy adds some hundred
// bytes.
impl<E: Entry> Chunks<E> {
    pub(crate) const fn new() -> Self {
        Self {
            chunks: Vec::new(),
            len: 0,
        }
    }

    pub(crate) fn len(&self) -> usize {
        self.len
    }

    pub(crate) fn first(&self) -> Option<&E> {
        self.chunks.first()?.first()
    }

    /// Returns the index of the chunk to which the key belongs.
    fn chunk(&self, key: &E::Key) -> usize {
        let after = self.chunks.partition_point(|chunk| {
            let first = chunk.first();
            first.is_none_or(|first| first.key() <= *key)
        });
        after.saturating_sub(1)
    }

    pub(crate) fn get(&self, key: &E::Key) -> Option<&E> {
        let chunk = self.chunks.get(self.chunk(key))?;
        let place = search(chunk, key).ok()?;
        chunk.get(place)
    }

    pub(crate) fn get_mut(&mut self, key: &E::Key) -> Option<&mut E> {
        let index = self.chunk(key);
        let chunk = self.chunks.get_mut(index)?;
        let place = search(chunk, key).ok()?;
        chunk.get_mut(place)
    }

    /// Adds an entry. Replaces the entry with the same key, if there is one.
    #[inline(never)]
    pub(crate) fn insert(&mut self, entry: E) {
        let key = entry.key();
        let index = self.chunk(&key);
        if self.chunks.is_empty() {
            self.chunks.push(Vec::new());
        }
        let chunk = &mut self.chunks[index];
        match search(chunk, &key) {
            Ok(place) => chunk[place] = entry,
            Err(place) => {
                chunk.insert(place, entry);
                self.len += 1;
                if chunk.len() == CHUNK {
                    let higher = chunk.split_off(CHUNK / 2);
                    self.chunks.insert(index + 1, higher);
                }
            }
        }
    }

    #[inline(never)]
    pub(crate) fn remove(&mut self, key: &E::Key) -> Option<E> {
        let index = self.chunk(key);
        let chunk = self.chunks.get_mut(index)?;
        let place = search(chunk, key).ok()?;
        let removed = chunk.remove(place);
        self.len -= 1;
        if chunk.is_empty() && self.chunks.len() > 1 {
            self.chunks.remove(index);
        }
        Some(removed)
    }

    pub(crate) fn iter(&self) -> Iter<'_, E> {
        let mut chunks = self.chunks.iter();
        Iter {
            entries: chunks.next().map_or(&[][..], Vec::as_slice).iter(),
            chunks,
        }
    }

    /// Returns the entries from the first one whose key is not lower than `key`.
    pub(crate) fn iter_from(&self, key: &E::Key) -> Iter<'_, E> {
        let mut chunks = self.chunks.iter();
        let chunk = chunks.nth(self.chunk(key));
        let entries = chunk.map_or(&[][..], Vec::as_slice);
        let lower = entries.partition_point(|entry| entry.key() < *key);
        Iter {
            entries: entries[lower..].iter(),
            chunks,
        }
    }
}

/// Returns the index of the entry with a key. If there is none, returns `Err` with the index at which to
/// insert one.
fn search<E: Entry>(chunk: &[E], key: &E::Key) -> Result<usize, usize> {
    chunk.binary_search_by(|entry| entry.key().cmp(key))
}

/// The entries of a list in their order.
pub(crate) struct Iter<'a, E> {
    /// The rest of the current chunk.
    entries: slice::Iter<'a, E>,
    chunks: slice::Iter<'a, Vec<E>>,
}

impl<'a, E> Iterator for Iter<'a, E> {
    type Item = &'a E;

    #[inline(never)]
    fn next(&mut self) -> Option<&'a E> {
        if self.entries.as_slice().is_empty() {
            self.entries = self.chunks.next()?.iter();
        }
        self.entries.next()
    }
}
