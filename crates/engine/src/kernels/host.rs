//! Code shared by the two backends in host memory.

/// The methods of [`Backend`](super::Backend) that only need `self.memory`, a [`Memory`](super::buffers::Memory) on the
/// host, and the methods for experts, which run one expert's layer after the other.
macro_rules! host_methods {
    () => {
        fn allocate_bytes(&mut self, len: usize) -> Result<ByteBuffer> {
            self.memory.collect();
            self.memory.add_bytes(len)
        }

        fn write_bytes(&mut self, to: Bytes, from: &[u8]) -> Result<()> {
            check::bytes(to, from.len())?;
            self.memory.bytes_mut(to)?.copy_from_slice(from);
            Ok(())
        }

        fn read_bytes(&self, from: Bytes, to: &mut [u8]) -> Result<()> {
            check::bytes(from, to.len())?;
            to.copy_from_slice(self.memory.bytes(from)?);
            Ok(())
        }

        fn map(&mut self, tensor: FileTensor) -> Result<FileBuffer> {
            Ok(self.memory.add_file(tensor))
        }

        fn allocated(&self) -> u64 {
            self.memory.allocated()
        }

        fn upload_indices(&mut self, values: &[u32]) -> Result<IndexBuffer> {
            Ok(self.memory.add_indices(values))
        }

        fn upload_plan(&mut self, plan: AttentionPlan) -> Result<PlanBuffer> {
            self.memory.add_plan(plan)
        }

        fn sync(&mut self) -> Result<()> {
            self.memory.collect();
            Ok(())
        }

        fn grouped_linear(&mut self, y: View, x: View, w: &[View], offsets: Indices) -> Result<()> {
            check::grouped(y, x, w, offsets)?;
            let offsets = self.memory.indices(offsets)?;
            experts::linear(self, &offsets, y, x, w)
        }

        fn grouped_linear_dx(&mut self, dx: View, dy: View, w: &[View], offsets: Indices) -> Result<()> {
            check::grouped(dx, dy, w, offsets)?;
            let offsets = self.memory.indices(offsets)?;
            experts::linear_dx(self, &offsets, dx, dy, w)
        }

        fn grouped_linear_dw(
            &mut self,
            dw: View,
            first: usize,
            accumulate: bool,
            dy: View,
            x: View,
            offsets: Indices,
        ) -> Result<()> {
            check::grouped_dw(dw, first, dy, x, offsets)?;
            let offsets = self.memory.indices(offsets)?;
            experts::linear_dw(self, &offsets, dw, first, accumulate, dy, x)
        }
    };
}

pub(super) use host_methods;
