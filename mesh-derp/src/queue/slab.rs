//! Values in one allocation, found by number.

use std::ops::{Index, IndexMut};

/// No value has this number.
pub(super) const NONE: u32 = u32::MAX;

#[derive(Debug)]
enum Slot<T> {
    Used(T),
    /// The next free one.
    Free(u32),
}

/// Values that keep their number for as long as they are in. What is taken out leaves room for the next one, so a slab
/// that has grown once allocates no more.
#[derive(Debug)]
pub(super) struct Slab<T> {
    slots: Vec<Slot<T>>,
    free: u32,
}

impl<T> Slab<T> {
    pub(super) const fn new() -> Self {
        Self { slots: Vec::new(), free: NONE }
    }

    pub(super) fn insert(&mut self, value: T) -> u32 {
        let number = self.free;
        if let Some(slot) = self.slots.get_mut(number as usize) {
            if let Slot::Free(next) = *slot {
                self.free = next;
            }
            *slot = Slot::Used(value);
            return number;
        }
        let number = u32::try_from(self.slots.len()).expect("a queue is bounded far below 2^32 packets");
        self.slots.push(Slot::Used(value));
        number
    }

    /// Takes a value out, if there is one of that number.
    pub(super) fn remove(&mut self, number: u32) -> Option<T> {
        let slot = self.slots.get_mut(number as usize).filter(|slot| matches!(slot, Slot::Used(_)))?;
        match std::mem::replace(slot, Slot::Free(self.free)) {
            Slot::Used(value) => {
                self.free = number;
                Some(value)
            }
            Slot::Free(_) => None,
        }
    }

    pub(super) fn get(&self, number: u32) -> Option<&T> {
        match self.slots.get(number as usize) {
            Some(Slot::Used(value)) => Some(value),
            Some(Slot::Free(_)) | None => None,
        }
    }

    pub(super) fn values_mut(&mut self) -> impl Iterator<Item = &mut T> {
        self.slots.iter_mut().filter_map(|slot| match slot {
            Slot::Used(value) => Some(value),
            Slot::Free(_) => None,
        })
    }
}

/// For numbers that are known to be in use.
impl<T> Index<u32> for Slab<T> {
    type Output = T;

    fn index(&self, number: u32) -> &T {
        self.get(number).expect("the number of a value that is in")
    }
}

impl<T> IndexMut<u32> for Slab<T> {
    fn index_mut(&mut self, number: u32) -> &mut T {
        match self.slots.get_mut(number as usize) {
            Some(Slot::Used(value)) => value,
            Some(Slot::Free(_)) | None => panic!("the number of a value that is in"),
        }
    }
}
