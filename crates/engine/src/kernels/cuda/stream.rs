//! The layer between the operations and a driver: memory reuse, uploads through page-locked memory, and passes that run
//! as graphs.
//!
//! The commands of a pass whose sizes were seen before are recorded and compared with those of its graph. Arguments
//! that have changed (a learning rate, a dropout key, an address) are changed in the graph, and the graph runs. Since
//! all arguments are compared, there is no list of variable arguments that could be incomplete. No graph is made for a
//! pass that is seen only once.

use super::driver::{Call, Command, Driver, Launch, Product};
use super::region::{ALIGNMENT, Region};
use super::staging::Staging;
use crate::Result;
use crate::collective::Collective;
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// The number of kinds of passes that are remembered; graphs use memory of the card.
const KINDS: usize = 32;

/// Counts of the operations on a card.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that are allocated, and their peak, scratch memory of operations included. The driver takes them from its
    /// pool in larger pieces.
    pub allocated: u64,
    /// See [`Usage::allocated`].
    pub peak: u64,
    /// Number of allocations.
    pub allocations: u64,
    /// How often the host has waited for the card.
    pub waits: u64,
    /// Passes that ran as graphs.
    pub replays: u64,
    /// Commands of graphs whose arguments were changed.
    pub changes: u64,
}

/// A driver, and the state kept between operations.
#[derive(Debug)]
pub(super) struct Stream {
    driver: Box<dyn Driver>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    graphs: bool,
    usage: Usage,
    /// Sizes of the driver's allocations, by address.
    sizes: HashMap<u64, usize>,
    work: WorkSpace,
    region: Region,
    /// The buffer that receives the uploads of a graph.
    inbox: Block,
    staging: Staging,
    pass: Option<Pass>,
    kinds: Vec<Kind>,
}

/// An allocation of the driver; none if its size is 0.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    address: u64,
    bytes: usize,
}

#[derive(Debug, Default)]
struct WorkSpace {
    block: Block,
    /// Bytes of the block in use, number of pieces in use, and bytes of all pieces of the operation.
    used: usize,
    live: usize,
    total: usize,
    /// The most bytes that an operation has needed.
    most: usize,
}

/// The current pass.
#[derive(Debug)]
struct Pass {
    key: Vec<u64>,
    /// The recorded commands, if the pass becomes a graph.
    commands: Option<Vec<Command>>,
    /// Bytes to upload, and the copies from them: until the end of the pass, their sources are offsets into these
    /// bytes.
    inbox: Vec<u8>,
    arrivals: Vec<usize>,
    /// Addresses to free at the end.
    frees: Vec<u64>,
}

/// A kind of pass: passes of the same sizes.
#[derive(Debug)]
struct Kind {
    key: Vec<u64>,
    graph: Option<(u64, Vec<Command>)>,
}

impl Stream {
    pub(super) fn new(driver: Box<dyn Driver>) -> Stream {
        Stream { driver, state: Mutex::new(State { graphs: true, ..State::default() }) }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Enables or disables graphs.
    pub(super) fn use_graphs(&self, graphs: bool) {
        self.state().graphs = graphs;
    }

    pub(super) fn usage(&self) -> Usage {
        self.state().usage
    }

    pub(super) fn allocate(&self, bytes: usize) -> Result<u64> {
        let mut state = self.state();
        if state.pass.is_none() {
            return state.allocate(&*self.driver, bytes);
        }
        let (place, address) = state.region.take(bytes);
        if let Some(address) = address {
            return Ok(address);
        }
        match state.allocate(&*self.driver, bytes) {
            Ok(address) => {
                state.region.put(place, address);
                Ok(address)
            }
            Err(error) => {
                state.region.cancel(place);
                Err(error)
            }
        }
    }

    /// As [`Stream::allocate`], for memory that outlives the pass.
    pub(super) fn allocate_kept(&self, bytes: usize) -> Result<u64> {
        self.state().allocate(&*self.driver, bytes)
    }

    /// Frees an allocation of this stream.
    ///
    /// # Safety
    /// It is no longer used.
    pub(super) unsafe fn free(&self, address: u64) {
        self.state().free(&*self.driver, address);
    }

    /// Takes scratch memory; returns its address, and whether it is a separate allocation.
    pub(super) fn take_work(&self, bytes: usize) -> Result<(u64, bool)> {
        let bytes = bytes.max(1).checked_next_multiple_of(ALIGNMENT).unwrap_or(usize::MAX);
        let state = &mut *self.state();
        if state.work.live == 0 {
            (state.work.used, state.work.total) = (0, 0);
            let (block, wanted) = (state.work.block, state.work.most.max(bytes));
            if wanted > block.bytes {
                state.work.block = state.replace(&*self.driver, block, wanted)?;
            }
        }
        let work = &mut state.work;
        let (address, own) = if bytes <= work.block.bytes - work.used {
            let start = work.used;
            work.used += bytes;
            (work.block.address + start as u64, false)
        } else {
            (state.allocate(&*self.driver, bytes)?, true)
        };
        let work = &mut state.work;
        work.live += 1;
        work.total = work.total.saturating_add(bytes);
        work.most = work.most.max(work.total);
        Ok((address, own))
    }

    /// Returns scratch memory.
    ///
    /// # Safety
    /// It was returned by [`Stream::take_work`], and is given back once.
    pub(super) unsafe fn give_work_back(&self, address: u64, own: bool) {
        let mut state = self.state();
        state.work.live -= 1;
        if own {
            state.free(&*self.driver, address);
        }
    }

    /// Host to device. The host's memory may change after the call.
    ///
    /// # Safety
    /// As [`Driver::upload`].
    pub(super) unsafe fn upload(&self, to: u64, from: &[u8]) -> Result<()> {
        let state = &mut *self.state();
        if let Some(Pass { commands: Some(commands), inbox, arrivals, .. }) = &mut state.pass {
            inbox.resize(inbox.len().next_multiple_of(16), 0);
            arrivals.push(commands.len());
            commands.push(Command::Copy { to, from: inbox.len() as u64, bytes: from.len() });
            inbox.extend_from_slice(from);
            return Ok(());
        }
        // SAFETY: guaranteed by the caller.
        unsafe { state.staging.upload(&*self.driver, to, from) }
    }

    /// Device to host, waiting for the copy.
    ///
    /// # Safety
    /// As [`Driver::download`].
    pub(super) unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let mut state = self.state();
        state.flush(&*self.driver)?;
        state.usage.waits += 1;
        // SAFETY: guaranteed by the caller.
        unsafe { self.driver.download(from, to) }
    }

    /// Waits for all issued operations.
    pub(super) fn synchronise(&self) -> Result<()> {
        let mut state = self.state();
        state.flush(&*self.driver)?;
        state.usage.waits += 1;
        self.driver.synchronise()
    }

    /// Connects to the cards of the other ranks, unless already connected.
    pub(super) fn join(&self, collective: &dyn Collective) -> Result<()> {
        self.state().flush(&*self.driver)?;
        self.driver.join(collective)
    }

    /// Issues sums and copies over the connected ranks.
    ///
    /// # Safety
    /// As [`Driver::exchange`].
    pub(super) unsafe fn exchange(&self, calls: &[Call]) -> Result<()> {
        self.state().flush(&*self.driver)?;
        // SAFETY: guaranteed by the caller.
        unsafe { self.driver.exchange(calls) }
    }

    /// # Safety
    /// As [`Driver::zero`].
    pub(super) unsafe fn zero(&self, address: u64, bytes: usize) -> Result<()> {
        self.ask(Command::Zero { address, bytes })
    }

    /// # Safety
    /// As [`Driver::copy`].
    pub(super) unsafe fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        self.ask(Command::Copy { to, from, bytes })
    }

    /// # Safety
    /// As [`Driver::launch`].
    pub(super) unsafe fn launch(
        &self,
        kernel: &'static CStr,
        [grid, block]: [[u32; 3]; 2],
        shared: u32,
        (words, starts): (Vec<u64>, Vec<usize>),
    ) -> Result<()> {
        self.ask(Command::Launch(Launch { kernel, grid, block, shared, words, starts }))
    }

    /// # Safety
    /// As [`Driver::matmul`].
    pub(super) unsafe fn matmul(&self, product: &Product) -> Result<()> {
        self.ask(Command::Product(*product))
    }

    fn ask(&self, command: Command) -> Result<()> {
        let mut state = self.state();
        if let Some(Pass { commands: Some(commands), .. }) = &mut state.pass {
            commands.push(command);
            return Ok(());
        }
        // SAFETY: guaranteed by the callers of the methods above.
        unsafe { command.run(&*self.driver) }
    }

    /// Begins a pass. Passes with the same key run the same operations, with other numbers.
    pub(super) fn begin_pass(&self, key: &[u64]) -> Result<()> {
        let mut state = self.state();
        if state.region.grows() {
            let old = Block { address: state.region.address, bytes: state.region.capacity };
            let wanted = state.region.most;
            let block = state.replace(&*self.driver, old, wanted)?;
            (state.region.address, state.region.capacity) = (block.address, block.bytes);
        }
        let mut seen = false;
        if state.graphs {
            // Kinds are ordered by last use.
            let known = state.kinds.iter().position(|kind| kind.key == key);
            seen = known.is_some();
            let kind = match known {
                Some(place) => state.kinds.remove(place),
                None => Kind { key: key.to_vec(), graph: None },
            };
            state.kinds.push(kind);
            if state.kinds.len() > KINDS {
                let oldest = state.kinds.remove(0);
                if let Some((graph, _)) = oldest.graph {
                    // SAFETY: the graph is no longer in the list.
                    unsafe { self.driver.forget(graph) };
                }
            }
        }
        state.pass = Some(Pass {
            key: key.to_vec(),
            commands: seen.then(Vec::new),
            inbox: Vec::new(),
            arrivals: Vec::new(),
            frees: Vec::new(),
        });
        Ok(())
    }

    /// Ends a pass: runs the recorded commands.
    pub(super) fn end_pass(&self) -> Result<()> {
        let mut state = self.state();
        let Some(mut pass) = state.pass.take() else { return Ok(()) };
        let result = state.finish(&*self.driver, &mut pass);
        pass.frees.into_iter().for_each(|address| state.free(&*self.driver, address));
        result
    }
}

impl State {
    fn allocate(&mut self, driver: &dyn Driver, bytes: usize) -> Result<u64> {
        let address = driver.allocate(bytes)?;
        self.sizes.insert(address, bytes);
        self.usage.allocations += 1;
        self.usage.allocated += bytes as u64;
        self.usage.peak = self.usage.peak.max(self.usage.allocated);
        Ok(address)
    }

    fn free(&mut self, driver: &dyn Driver, address: u64) {
        // Recorded commands may still use it.
        if let Some(pass) = &mut self.pass {
            pass.frees.push(address);
            return;
        }
        if self.region.give_back(address) == Some(true) {
            return;
        }
        if let Some(bytes) = self.sizes.remove(&address) {
            self.usage.allocated -= bytes as u64;
            // SAFETY: it was allocated and not freed yet.
            unsafe { driver.free(address) };
        }
    }

    /// Replaces a block by a larger one; its contents are lost.
    fn replace(&mut self, driver: &dyn Driver, old: Block, bytes: usize) -> Result<Block> {
        if old.bytes > 0 {
            self.free(driver, old.address);
        }
        Ok(Block { address: self.allocate(driver, bytes)?, bytes })
    }

    /// Runs the recorded commands because the host is about to wait for them; the rest of the pass runs as it is
    /// issued.
    fn flush(&mut self, driver: &dyn Driver) -> Result<()> {
        let Some(pass) = &mut self.pass else { return Ok(()) };
        let Some(commands) = pass.commands.take() else { return Ok(()) };
        let (inbox, arrivals) = (std::mem::take(&mut pass.inbox), std::mem::take(&mut pass.arrivals));
        for (n, command) in commands.iter().enumerate() {
            // SAFETY: guaranteed by the callers who issued the commands; memory that they freed since is still
            // allocated.
            unsafe {
                match command {
                    Command::Copy { to, from, bytes } if arrivals.contains(&n) => {
                        let start = *from as usize;
                        self.staging.upload(driver, *to, &inbox[start..start + bytes])?;
                    }
                    _ => command.run(driver)?,
                }
            }
        }
        Ok(())
    }

    fn finish(&mut self, driver: &dyn Driver, pass: &mut Pass) -> Result<()> {
        let Some(mut commands) = pass.commands.take() else { return Ok(()) };
        if commands.is_empty() {
            return Ok(());
        }
        if pass.inbox.len() > self.inbox.bytes {
            self.inbox = self.replace(driver, self.inbox, pass.inbox.len())?;
        }
        for place in &pass.arrivals {
            if let Command::Copy { from, .. } = &mut commands[*place] {
                *from += self.inbox.address;
            }
        }
        let Some(kind) = self.kinds.iter_mut().find(|kind| kind.key == pass.key) else { return Ok(()) };
        let alike = |old: &[Command]| {
            old.len() == commands.len() && old.iter().zip(&commands).all(|(a, b)| a.is_like(b))
        };
        // SAFETY: guaranteed by the callers who issued the commands; graphs are used only until they are forgotten.
        unsafe {
            let graph = match kind.graph.take() {
                Some((graph, old)) if alike(&old) => {
                    for (place, (old, new)) in old.iter().zip(&commands).enumerate() {
                        if old != new {
                            driver.change(graph, place, new)?;
                            self.usage.changes += 1;
                        }
                    }
                    graph
                }
                other => {
                    if let Some((graph, _)) = other {
                        driver.forget(graph);
                    }
                    driver.graph(&commands)?
                }
            };
            kind.graph = Some((graph, commands));
            self.staging.upload(driver, self.inbox.address, &pass.inbox)?;
            driver.replay(graph)?;
        }
        self.usage.replays += 1;
        Ok(())
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let state = self.state.get_mut().unwrap_or_else(PoisonError::into_inner);
        let driver = &*self.driver;
        let _ = driver.synchronise();
        // SAFETY: nothing is running any more, and every holder of an allocation also holds the stream.
        unsafe {
            for (graph, _) in state.kinds.iter_mut().filter_map(|kind| kind.graph.take()) {
                driver.forget(graph);
            }
            state.staging.free(driver);
            for address in state.sizes.keys() {
                driver.free(*address);
            }
        }
    }
}
