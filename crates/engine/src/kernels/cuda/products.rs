//! Matrix products, with factors converted to the types that the card multiplies.

use super::allocation::Work;
use super::copies::PAD;
use super::driver::{Factor, Factors, Product};
use super::launch::{Size, launch};
use super::{Cuda, Precision, lies_as};
use crate::Result;
use crate::dtype::WeightType;
use crate::kernels::{Dtype, View};

/// A factor, and the memory of its converted copy.
struct Held {
    factor: Factor,
    _memory: Option<Work>,
}

impl Held {
    fn t(self) -> Held {
        Held { factor: Factor { transposed: !self.factor.transposed, ..self.factor }, ..self }
    }
}

impl Cuda {
    /// `c (+)= a · b + bias`, for the matrices of these views; a factor whose flag is set is transposed first.
    ///
    /// f32 factors are rounded to the card's type for the product, except weights that have a copy; bf16 in a file is
    /// used in place.
    pub(super) fn product(
        &self,
        c: View,
        accumulate: bool,
        a: (View, bool),
        b: (View, bool),
        bias: Option<View>,
    ) -> Result<()> {
        let (m, n) = (c.rows(), c.width());
        let k = if a.1 { a.0.rows() } else { a.0.width() };
        if m == 0 || n == 0 {
            return Ok(());
        }
        if k == 0 {
            return self.empty_product(c, accumulate, bias);
        }
        let held = |(view, turned): (View, bool)| {
            let held = self.factor(view)?;
            Ok::<_, crate::Error>(if turned { held.t() } else { held })
        };
        let (a, b) = (held(a)?, held(b)?);
        let bias = bias.map(|bias| self.source(bias)).transpose()?;
        // After the factors: preparing them may refresh copies, which writing to `c` may make stale again.
        let to = self.target(c)?;
        let factors = match self.precision {
            Precision::Bf16 => Factors::Bf16,
            Precision::Tf32 => Factors::Tf32,
            Precision::F32 => Factors::F32,
        };
        let product = Product {
            m,
            n,
            k,
            factors,
            a: a.factor,
            b: b.factor,
            c: to,
            c_stride: if m > 1 { c.stride() } else { n },
            accumulate,
            bias,
        };
        // SAFETY: views are inside their buffers, `check` has compared the sizes, and the result overlaps no factor.
        unsafe { self.driver.matmul(&product) }
    }

    /// A product over zero terms: only the bias.
    fn empty_product(&self, c: View, accumulate: bool, bias: Option<View>) -> Result<()> {
        let (to, rows, width) = (self.target(c)?, c.rows(), c.width());
        if !accumulate {
            for row in 0..c.rows() {
                self.zero(c.row_range(row..row + 1))?;
            }
        }
        let Some(bias) = bias else { return Ok(()) };
        let bias = self.source(bias)?;
        launch!(self, c"add_row", Size::matrix(rows, width), [to, c.stride(), bias, rows, width])
    }

    /// A matrix as a factor.
    fn factor(&self, view: View) -> Result<Held> {
        if let Dtype::Packed(_) = view.dtype() {
            let (address, memory) = self.unpacked(view, self.precision == Precision::Bf16)?;
            let factor = Factor { address, stride: view.width(), transposed: false };
            return Ok(Held { factor, _memory: Some(memory) });
        }
        // As stored: a transposed view of a file is the original matrix there.
        let transposed = view.column() != 1;
        let (rows, width, stride) = match transposed {
            true => (view.width(), view.rows(), view.column()),
            false => (view.rows(), view.width(), view.stride()),
        };
        let stride = if rows > 1 { stride } else { width };
        let as_it_lies = |address| Held { factor: Factor { address, stride, transposed }, _memory: None };
        if let Some(copy) = self.copy_of(view)? {
            return Ok(as_it_lies(copy));
        }
        if let Some((address, stride)) = self.shared_copy(view)? {
            return Ok(Held { factor: Factor { address, stride, transposed }, _memory: None });
        }
        let from = self.source(view)?;
        let (kernel, bytes, pad) = match (self.precision, lies_as(view)) {
            (Precision::Bf16, WeightType::BF16) => return Ok(as_it_lies(from)),
            (Precision::Bf16, WeightType::F32) => (c"f32_to_bf16", 2, PAD),
            (Precision::Bf16, WeightType::F16) => (c"f16_to_bf16", 2, PAD),
            (_, WeightType::F32) => return Ok(as_it_lies(from)),
            (_, WeightType::BF16) => (c"bf16_to_f32", 4, 1),
            (_, WeightType::F16) => (c"f16_to_f32", 4, 1),
        };
        if bytes == 2 {
            self.count_rounded(rows * width);
        }
        let padded = width.next_multiple_of(pad);
        let memory = self.work(rows.saturating_mul(padded).saturating_mul(bytes))?;
        let address = memory.address();
        launch!(self, kernel, Size::matrix(rows, padded), [address, padded, from, stride, rows, width])?;
        Ok(Held { factor: Factor { address, stride: padded, transposed }, _memory: Some(memory) })
    }
}
