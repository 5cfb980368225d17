//! What stands between the operations and a driver: memory that is used again, uploads through page-locked memory, and
//! passes that run as graphs.
//!
//! The commands of a pass whose sizes were seen before are collected, and compared with those of its graph. What has
//! changed since (a learning rate, a key of dropout, an address) is changed in the graph, and the graph runs: no list of
//! such arguments is kept that could be incomplete. Nothing is made of a pass that is seen once only.

use super::driver::{Call, Command, Driver, Launch, Product};
use super::region::{ALIGNMENT, Region};
use super::staging::Staging;
use crate::Result;
use crate::collective::Collective;
use std::collections::HashMap;
use std::ffi::CStr;
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Kinds of passes that are remembered; graphs take memory of the card.
const KINDS: usize = 32;

/// What a card was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes that are allocated, and the most that were at once, work space of operations included. The driver takes them
    /// from its pool in larger pieces.
    pub allocated: u64,
    /// See [`Usage::allocated`].
    pub peak: u64,
    /// Allocations.
    pub allocations: u64,
    /// How often the host has waited for the card.
    pub waits: u64,
    /// Passes that ran as graphs.
    pub replays: u64,
    /// Commands of graphs that were given other arguments.
    pub changes: u64,
}

/// A driver, and what is kept between operations.
#[derive(Debug)]
pub(super) struct Stream {
    driver: Box<dyn Driver>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    graphs: bool,
    usage: Usage,
    /// Sizes of the driver's allocations.
    sizes: HashMap<u64, usize>,
    work: WorkSpace,
    region: Region,
    /// Where the uploads of a graph arrive, and how large it is.
    inbox: Block,
    staging: Staging,
    pass: Option<Pass>,
    kinds: Vec<Kind>,
}

/// An allocation of the driver's; of size 0, none.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    address: u64,
    bytes: usize,
}

#[derive(Debug, Default)]
struct WorkSpace {
    block: Block,
    /// Bytes of the block that are taken, pieces that are, and bytes of all pieces of the operation.
    used: usize,
    live: usize,
    total: usize,
    /// The most that an operation has needed.
    most: usize,
}

/// The pass that runs.
#[derive(Debug)]
struct Pass {
    key: Vec<u64>,
    /// What is collected, where the pass becomes a graph.
    commands: Option<Vec<Command>>,
    /// Bytes to upload, and the copies from them: their starts are places in these bytes until the end of the pass.
    inbox: Vec<u8>,
    arrivals: Vec<usize>,
    /// What to free at the end.
    frees: Vec<u64>,
}

/// Passes of the same sizes.
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

    /// Runs passes as graphs, or not.
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

    /// As [`Stream::allocate`], for what outlives the pass.
    pub(super) fn allocate_kept(&self, bytes: usize) -> Result<u64> {
        self.state().allocate(&*self.driver, bytes)
    }

    /// Frees what was allocated here.
    ///
    /// # Safety
    /// It is not used any more.
    pub(super) unsafe fn free(&self, address: u64) {
        self.state().free(&*self.driver, address);
    }

    /// Work space, and whether it is an allocation of its own.
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

    /// Gives work space back.
    ///
    /// # Safety
    /// It is what [`Stream::take_work`] has returned, and is given back once.
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
        // SAFETY: by the caller.
        unsafe { state.staging.upload(&*self.driver, to, from) }
    }

    /// Device to host; waits.
    ///
    /// # Safety
    /// As [`Driver::download`].
    pub(super) unsafe fn download(&self, from: u64, to: &mut [u8]) -> Result<()> {
        let mut state = self.state();
        state.flush(&*self.driver)?;
        state.usage.waits += 1;
        // SAFETY: by the caller.
        unsafe { self.driver.download(from, to) }
    }

    /// Waits for all that was asked for.
    pub(super) fn synchronise(&self) -> Result<()> {
        let mut state = self.state();
        state.flush(&*self.driver)?;
        state.usage.waits += 1;
        self.driver.synchronise()
    }

    /// Meets the cards of the other ranks, unless it has.
    pub(super) fn join(&self, collective: &dyn Collective) -> Result<()> {
        self.state().flush(&*self.driver)?;
        self.driver.join(collective)
    }

    /// Asks for sums and copies over the ranks that were met.
    ///
    /// # Safety
    /// As [`Driver::exchange`].
    pub(super) unsafe fn exchange(&self, calls: &[Call]) -> Result<()> {
        self.state().flush(&*self.driver)?;
        // SAFETY: by the caller.
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
        // SAFETY: by the callers of the methods above.
        unsafe { command.run(&*self.driver) }
    }

    /// Begins a pass. Passes with the same key do the same, with other numbers.
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
            // The last one used is the last of all.
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
                    // SAFETY: it is not in the list any more.
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

    /// Ends a pass: what was collected runs.
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
        // What was collected may use it.
        if let Some(pass) = &mut self.pass {
            pass.frees.push(address);
            return;
        }
        if self.region.give_back(address) == Some(true) {
            return;
        }
        if let Some(bytes) = self.sizes.remove(&address) {
            self.usage.allocated -= bytes as u64;
            // SAFETY: it was allocated and not freed.
            unsafe { driver.free(address) };
        }
    }

    /// A larger block in place of one, whose content is lost.
    fn replace(&mut self, driver: &dyn Driver, old: Block, bytes: usize) -> Result<Block> {
        if old.bytes > 0 {
            self.free(driver, old.address);
        }
        Ok(Block { address: self.allocate(driver, bytes)?, bytes })
    }

    /// Runs what was collected, where the host is about to wait for it; the rest of the pass runs as it is asked for.
    fn flush(&mut self, driver: &dyn Driver) -> Result<()> {
        let Some(pass) = &mut self.pass else { return Ok(()) };
        let Some(commands) = pass.commands.take() else { return Ok(()) };
        let (inbox, arrivals) = (std::mem::take(&mut pass.inbox), std::mem::take(&mut pass.arrivals));
        for (n, command) in commands.iter().enumerate() {
            // SAFETY: by the callers who asked for the commands; memory that they freed is still there.
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
        // SAFETY: by the callers who asked for the commands; graphs are used until they are forgotten.
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
        // SAFETY: nothing runs any more, and whoever holds an allocation holds the stream.
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
