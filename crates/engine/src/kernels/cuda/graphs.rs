//! CUDA graphs of passes: a chain of nodes, one per command.
//!
//! A launch of our kernels is a kernel node, whose arguments can be changed. Calls of the driver and of cuBLASLt
//! (products, copies, zeros) are captured from the stream as child graphs, and captured again to change them.

use super::driver::{Command, Launch};
use super::found::failure;
use crate::{Error, Result};
use cudarc::driver::{result as cu, sys};
use std::collections::HashMap;
use std::ffi::c_void;

/// The operations of a card that graphs use.
pub(super) trait Captures {
    /// A kernel launch as a graph node.
    fn node(&self, launch: &Launch, arguments: &mut [*mut c_void]) -> Result<sys::CUDA_KERNEL_NODE_PARAMS>;
    /// The work of a command as a graph: captured from the stream without running.
    ///
    /// # Safety
    /// As [`super::driver::Driver`].
    unsafe fn captured(&self, command: &Command) -> Result<sys::CUgraph>;
    /// The stream on which graphs run.
    fn stream(&self) -> sys::CUstream;
}

/// The graphs of a card, by their numbers.
#[derive(Default)]
pub(super) struct Graphs {
    made: HashMap<u64, Graph>,
    next: u64,
}

// SAFETY: handles may be used from any thread, one at a time, with the context current; the callers ensure both.
unsafe impl Send for Graphs {}

/// An executable graph, and the graph that it was made from, whose nodes identify the commands.
struct Graph {
    source: sys::CUgraph,
    runs: sys::CUgraphExec,
    nodes: Vec<sys::CUgraphNode>,
}

impl Drop for Graph {
    fn drop(&mut self) {
        // SAFETY: made here and destroyed only here; pending runs finish first.
        unsafe {
            let _ = cu::graph::exec_destroy(self.runs);
            let _ = cu::graph::destroy(self.source);
        }
    }
}

/// A graph that is destroyed when it is dropped.
struct Owned(sys::CUgraph);

impl Drop for Owned {
    fn drop(&mut self) {
        // SAFETY: owned, and destroyed only here.
        let _ = unsafe { cu::graph::destroy(self.0) };
    }
}

fn checked(call: &str, code: sys::CUresult) -> Result<()> {
    code.result().map_err(|e| match failure(call, e) {
        Error::Device { message, help } => {
            Error::Device { message, help: format!("cuda_graphs=false trains without graphs; else, {help}") }
        }
        other => other,
    })
}

impl Graphs {
    /// Makes a graph.
    ///
    /// # Safety
    /// As [`super::driver::Driver::graph`], in the current context.
    pub(super) unsafe fn make(&mut self, card: &impl Captures, commands: &[Command]) -> Result<u64> {
        let mut source = std::ptr::null_mut();
        // SAFETY: the handles were just made; the caller guarantees the addresses.
        unsafe {
            checked("cuGraphCreate", sys::cuGraphCreate(&mut source, 0))?;
            let source = Owned(source);
            let mut nodes: Vec<sys::CUgraphNode> = Vec::with_capacity(commands.len());
            for command in commands {
                // Each node depends on the one before it.
                let (before, count) = match nodes.last() {
                    Some(last) => (std::ptr::from_ref(last), 1),
                    None => (std::ptr::null(), 0),
                };
                let mut node = std::ptr::null_mut();
                match command {
                    Command::Launch(launch) => {
                        let mut arguments = launch.arguments();
                        let what = card.node(launch, &mut arguments)?;
                        let code = sys::cuGraphAddKernelNode_v2(&mut node, source.0, before, count, &what);
                        checked("cuGraphAddKernelNode", code)?;
                    }
                    other => {
                        let child = Owned(card.captured(other)?);
                        let code = sys::cuGraphAddChildGraphNode(&mut node, source.0, before, count, child.0);
                        checked("cuGraphAddChildGraphNode", code)?;
                    }
                }
                nodes.push(node);
            }
            let mut runs = std::ptr::null_mut();
            let code = sys::cuGraphInstantiateWithFlags(&mut runs, source.0, 0);
            checked("cuGraphInstantiate", code)?;
            let graph = Graph { source: source.0, runs, nodes };
            std::mem::forget(source);
            let number = self.next;
            self.next += 1;
            self.made.insert(number, graph);
            Ok(number)
        }
    }

    /// Changes a command.
    ///
    /// # Safety
    /// As [`super::driver::Driver::change`], in the current context.
    pub(super) unsafe fn change(
        &mut self,
        card: &impl Captures,
        graph: u64,
        place: usize,
        command: &Command,
    ) -> Result<()> {
        let of = self.made.get(&graph).and_then(|graph| Some((graph.runs, *graph.nodes.get(place)?)));
        let (runs, node) = of.ok_or_else(|| unknown(graph))?;
        // SAFETY: the handles belong to the graph; the caller guarantees the addresses.
        unsafe {
            match command {
                Command::Launch(launch) => set(card, runs, node, launch),
                other => {
                    let child = Owned(card.captured(other)?);
                    let code = sys::cuGraphExecChildGraphNodeSetParams(runs, node, child.0);
                    checked("cuGraphExecChildGraphNodeSetParams", code)
                }
            }
        }
    }

    /// Runs a graph.
    ///
    /// # Safety
    /// As [`super::driver::Driver::replay`], in the current context.
    pub(super) unsafe fn replay(&self, card: &impl Captures, graph: u64) -> Result<()> {
        let graph = self.made.get(&graph).ok_or_else(|| unknown(graph))?;
        // SAFETY: the handles belong to the graph and the card.
        checked("cuGraphLaunch", unsafe { sys::cuGraphLaunch(graph.runs, card.stream()) })
    }

    pub(super) fn forget(&mut self, graph: u64) {
        self.made.remove(&graph);
    }
}

/// Replaces the launch of a kernel node by another one of the same kernel.
///
/// # Safety
/// The handles belong to one graph of the card; the launch satisfies [`super::driver::Driver::launch`].
unsafe fn set(
    card: &impl Captures,
    runs: sys::CUgraphExec,
    node: sys::CUgraphNode,
    launch: &Launch,
) -> Result<()> {
    let mut arguments = launch.arguments();
    let what = card.node(launch, &mut arguments)?;
    // SAFETY: guaranteed by the caller; the driver copies the arguments.
    let code = unsafe { sys::cuGraphExecKernelNodeSetParams_v2(runs, node, &what) };
    checked("cuGraphExecKernelNodeSetParams", code)
}

fn unknown(graph: u64) -> Error {
    Error::Operands { operation: "graph", message: format!("no graph {graph}") }
}
