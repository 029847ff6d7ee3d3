//! Gradients for a training step: a tape beside Candle's own graph.
//!
//! Candle's backward pass fills each gradient with zeros, adds to it, and keeps every intermediate
//! result until the loss is dropped. On a tape a first gradient is moved, later ones are added by
//! the matrix product that computes them where there is one, those of weights are f32 whatever the
//! dtype of the activations, and what an operation kept is freed once it has been used.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt::Display;

use candle_core::op::BackpropOp;
use candle_core::{
    CpuStorage, CudaStorage, CustomOp1, CustomOp2, CustomOp3, DType, Error, Layout, MetalStorage,
    Result, Shape, Storage, StorageRef, Tensor, TensorId, Var, bail,
};

use crate::profile::mark;

/// Name of a stretch of Candle's operations.
const CANDLE: &str = "Candle's own";

/// What an operation does with the gradient of its output.
type Backward = Box<dyn FnOnce(Gradient, &mut Gradients) -> Result<()>>;

struct Node {
    name: &'static str,
    output: TensorId,
    /// What the gradient is rounded to first.
    dtype: Option<DType>,
    backward: Backward,
}

thread_local! {
    /// Where the operations of this thread are recorded.
    static RECORDING: RefCell<Option<Tape>> = const { RefCell::new(None) };
}

/// The differentiable operations of this crate that a function ran, for its backward pass.
///
/// Candle's operations may come between: a stretch of them counts as one operation, which Candle
/// differentiates. That is correct, but slow. What is recorded is a variable to Candle, whose own
/// backward pass ends there. A tape belongs to the thread that records it.
///
/// ```
/// use candle_core::{Device, Result, Var};
/// use candle_rope_attn::ops::{Gradients, Tape, gelu, linear};
///
/// # fn main() -> Result<()> {
/// let weight = Var::randn(0f32, 1f32, (4, 8), &Device::Cpu)?;
/// let x = Var::randn(0f32, 1f32, (3, 8), &Device::Cpu)?;
/// let (loss, tape) = Tape::record(|| gelu(&linear(&x, &weight, None)?)?.sum_all())?;
/// let mut gradients = Gradients::default();
/// tape.backward(&loss, 1.0, &mut gradients)?;
/// assert_eq!(gradients.remove(&weight).map(|g| g.dims().to_vec()), Some(vec![4, 8]));
/// # Ok(())
/// # }
/// ```
#[derive(Default)]
pub struct Tape {
    nodes: Vec<Node>,
    /// Results of Candle's operations that have a node already.
    adopted: HashSet<TensorId>,
}

impl Tape {
    /// Runs `f` and records its operations on tensors that lead to variables.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn record<T, E>(
        f: impl FnOnce() -> std::result::Result<T, E>,
    ) -> std::result::Result<(T, Self), E> {
        /// Puts the tape back that was recording before, also when `f` panics.
        struct Outer(Option<Tape>);
        impl Drop for Outer {
            fn drop(&mut self) {
                RECORDING.set(self.0.take());
            }
        }
        let _outer = Outer(RECORDING.replace(Some(Self::default())));
        let result = f()?;
        let tape = RECORDING.take().unwrap_or_default();
        Ok((result, tape))
    }

    /// Adds the gradients of `scale * loss`, a scalar of the recorded function, to `gradients`:
    /// those of several tapes add up there.
    ///
    /// # Errors
    /// When memory runs out, or the loss does not come from the recorded function.
    pub fn backward(self, loss: &Tensor, scale: f64, gradients: &mut Gradients) -> Result<()> {
        if loss.rank() != 0 {
            bail!(
                "backward: got a loss of shape {:?}, expected a scalar",
                loss.dims()
            )
        }
        let seed = (loss.ones_like()?.detach() * scale)?;
        let number = Some(scale);
        let grad = Gradient {
            number,
            ..seed.into()
        };
        self.start(loss, grad, gradients)
    }

    /// Adds the gradients of `sum(output * grad)` to `gradients`; `grad` has the shape and dtype of
    /// `output`, a result of the recorded function.
    ///
    /// # Errors
    /// As [`Self::backward`], and when shape or dtype is another.
    pub fn backward_from(
        self,
        output: &Tensor,
        grad: &Tensor,
        gradients: &mut Gradients,
    ) -> Result<()> {
        if (output.shape(), output.dtype()) != (grad.shape(), grad.dtype()) {
            bail!(
                "backward: got a gradient of shape {:?} in {:?} for an output of {:?} in {:?}, expected both alike",
                grad.dims(),
                grad.dtype(),
                output.dims(),
                output.dtype()
            )
        }
        self.start(output, grad.detach().into(), gradients)
    }

    fn start(mut self, output: &Tensor, grad: Gradient, gradients: &mut Gradients) -> Result<()> {
        self.adopt(output);
        if !self.nodes.iter().any(|node| node.output == output.id()) {
            bail!("backward: the output does not come from the recorded function")
        }
        self.propagate(output, grad, gradients)
    }

    /// Goes back from an output of the recorded function whose gradient is known.
    fn propagate(
        mut self,
        output: &Tensor,
        grad: Gradient,
        gradients: &mut Gradients,
    ) -> Result<()> {
        gradients.put(output, grad);
        while let Some(node) = self.nodes.pop() {
            if let Some(mut grad) = gradients.0.remove(&node.output) {
                // The gradient of a weight is f32 where the weight may be narrower.
                if let Some(dtype) = node.dtype {
                    grad.value = grad.value.to_dtype(dtype)?;
                }
                (node.backward)(grad, gradients)?;
                mark("backward", node.name);
            }
        }
        Ok(())
    }

    /// Makes one node of the operations of Candle that lead to x, if there are any.
    fn adopt(&mut self, x: &Tensor) {
        if x.is_variable() || !x.track_op() || !self.adopted.insert(x.id()) {
            return;
        }
        let output = x.clone();
        let backward: Backward = Box::new(move |grad, gradients| {
            let mut found = (&output * grad.value)?.sum_all()?.backward()?;
            for variable in output.sorted_nodes() {
                if let Some(grad) = found.remove(variable) {
                    gradients.add(variable, grad.detach())?;
                }
            }
            Ok(())
        });
        mark("forward", CANDLE);
        self.nodes.push(Node {
            name: CANDLE,
            output: x.id(),
            dtype: Some(x.dtype()),
            backward,
        });
    }
}

/// The gradient of one tensor.
pub(crate) struct Gradient {
    pub value: Tensor,
    /// Sums over all axes but the last, f32, where the operation that made it had them at hand: they
    /// are the gradient of a bias.
    pub column_sum: Option<Tensor>,
    /// The value of a scalar, where it is known without waiting for a device.
    pub number: Option<f64>,
}

impl Gradient {
    /// The gradient of an input, from what it is where this one, a scalar, is 1.
    pub fn scale(&self, grad: Tensor) -> Result<Tensor> {
        match self.number {
            Some(1.0) => Ok(grad),
            Some(number) => grad * number,
            None => grad.broadcast_mul(&self.value),
        }
    }
}

impl From<Tensor> for Gradient {
    fn from(value: Tensor) -> Self {
        Self {
            value,
            column_sum: None,
            number: None,
        }
    }
}

/// Gradients by tensor.
#[derive(Default)]
pub struct Gradients(HashMap<TensorId, Gradient>);

impl Gradients {
    /// Takes out the gradient of a variable, contiguous, in its shape. It is f32 where the variable
    /// is a weight of a linear layer on a GPU, else in the dtype of the variable.
    pub fn remove(&mut self, variable: &Tensor) -> Option<Tensor> {
        self.0.remove(&variable.id()).map(|grad| grad.value)
    }

    /// As [`Self::remove`], in a dtype.
    pub(crate) fn remove_as(&mut self, variable: &Tensor, dtype: DType) -> Result<Option<Tensor>> {
        let found = self.remove(variable);
        found.map(|grad| grad.to_dtype(dtype)).transpose()
    }

    /// Puts in the whole gradient of x, for what [`Self::remove`] gave and more.
    pub(crate) fn put(&mut self, x: &Tensor, grad: Gradient) {
        self.0.insert(x.id(), grad);
    }

    /// Adds to the gradient of x, if it leads to a variable.
    pub(crate) fn add(&mut self, x: impl Into<Target>, grad: impl Into<Gradient>) -> Result<()> {
        if let Target(Some(id)) = x.into() {
            let (grad, before) = (grad.into(), self.0.remove(&id));
            let sum = match before {
                Some(before) => add_wider(before.value, grad.value)?.into(),
                None => grad,
            };
            self.0.insert(id, sum);
        }
        Ok(())
    }
}

/// A tensor to have a gradient, without its memory: for operations that need not know what it was.
#[derive(Clone, Copy)]
pub(crate) struct Target(Option<TensorId>);

impl From<&Tensor> for Target {
    fn from(x: &Tensor) -> Self {
        Self(x.track_op().then(|| x.id()))
    }
}

/// Activation checkpointing (Chen et al. 2016, <https://arxiv.org/abs/1604.06174>): `f(x)`, of which a
/// [`Tape`] keeps x alone. The backward pass runs `f` again, which must do the same again.
///
/// # Errors
/// Those of `f`, and when memory runs out.
pub fn checkpoint<E: Display + From<Error>>(
    x: &Tensor,
    f: impl Fn(&Tensor) -> std::result::Result<Tensor, E> + 'static,
) -> std::result::Result<Tensor, E> {
    if RECORDING.with_borrow(Option::is_none) {
        return f(x);
    }
    // What this tape keeps is freed at once.
    let (mut y, _) = Tape::record(|| f(x))?;
    if !y.track_op() {
        return Ok(y);
    }
    // What Candle computed last is no variable to it yet.
    if !y.is_variable() {
        y = variable(&y)?;
    }
    let x = x.clone();
    push("checkpoint", &y, move |grad, gradients| {
        let again = Tape::record(|| f(&x)).map_err(|error| Error::msg(format!("{error:#}")));
        let (y, mut tape) = again?;
        tape.adopt(&y);
        tape.propagate(&y, grad, gradients)
    });
    Ok(y)
}

/// `a + b` in the wider of their dtypes.
fn add_wider(a: Tensor, b: Tensor) -> Result<Tensor> {
    let wider = match a.dtype().size_in_bytes() >= b.dtype().size_in_bytes() {
        true => a.dtype(),
        false => b.dtype(),
    };
    a.to_dtype(wider)? + b.to_dtype(wider)?
}

/// Whether a tape records and one of the inputs leads to a variable. Else an operation belongs to
/// Candle's graph.
pub(crate) fn records(inputs: &[&Tensor]) -> bool {
    RECORDING.with_borrow_mut(|tape| match tape {
        Some(tape) if inputs.iter().any(|x| x.track_op()) => {
            inputs.iter().for_each(|x| tape.adopt(x));
            true
        }
        _ => false,
    })
}

/// A result that is on the tape. For Candle it is a variable, so that what Candle computes from it
/// has a gradient.
pub(crate) fn output(storage: Storage, shape: impl Into<Shape>) -> Tensor {
    Tensor::from_storage(storage, shape, BackpropOp::none(), true)
}

/// As [`output`], of what Candle computed.
pub(crate) fn variable(y: &Tensor) -> Result<Tensor> {
    Ok(Var::from_tensor(&y.detach())?.into_inner())
}

/// Records how the gradient of an [`output`], in its dtype, gives others.
pub(crate) fn push(
    name: &'static str,
    output: &Tensor,
    backward: impl FnOnce(Gradient, &mut Gradients) -> Result<()> + 'static,
) {
    push_node(name, output, Some(output.dtype()), Box::new(backward));
}

/// As [`push`], where the gradient may be wider than the output.
pub(crate) fn push_wide(
    name: &'static str,
    output: &Tensor,
    backward: impl FnOnce(Gradient, &mut Gradients) -> Result<()> + 'static,
) {
    push_node(name, output, None, Box::new(backward));
}

fn push_node(name: &'static str, output: &Tensor, dtype: Option<DType>, backward: Backward) {
    let output = output.id();
    mark("forward", name);
    RECORDING.with_borrow_mut(|tape| {
        if let Some(tape) = tape {
            tape.nodes.push(Node {
                name,
                output,
                dtype,
                backward,
            });
        }
    });
}

/// Runs an operation of one input on the tape, if one records it, or else in Candle's graph.
pub(crate) fn apply1<C: CustomOp1 + Send + Sync + 'static>(op: C, x: &Tensor) -> Result<Tensor> {
    if !records(&[x]) {
        return x.apply_op1(op);
    }
    let y = run1(&op, x)?;
    let (x, saved) = (x.clone(), y.clone());
    push(op.name(), &y, move |grad, gradients| {
        add_all([(&x, op.bwd(&x, &saved, &grad.value)?)], gradients)
    });
    Ok(y)
}

/// As [`apply1`], of two inputs.
pub(crate) fn apply2<C: CustomOp2 + Send + Sync + 'static>(
    op: C,
    a: &Tensor,
    b: &Tensor,
) -> Result<Tensor> {
    if !records(&[a, b]) {
        return a.apply_op2(b, op);
    }
    let (b_storage, b_layout) = b.storage_and_layout();
    let y = run(a, |storage, layout| match (storage, &*b_storage) {
        (Storage::Cpu(a), Storage::Cpu(b)) => op.cpu_fwd(a, layout, b, b_layout).map(on_cpu),
        (Storage::Cuda(a), Storage::Cuda(b)) => op.cuda_fwd(a, layout, b, b_layout).map(on_cuda),
        _ => bail!("{}: the arguments are on different devices", op.name()),
    })?;
    drop(b_storage);
    let (a, b, saved) = (a.clone(), b.clone(), y.clone());
    push(op.name(), &y, move |grad, gradients| {
        let (da, db) = op.bwd(&a, &b, &saved, &grad.value)?;
        add_all([(&a, da), (&b, db)], gradients)
    });
    Ok(y)
}

/// As [`apply1`], of three inputs.
pub(crate) fn apply3<C: CustomOp3 + Send + Sync + 'static>(
    op: C,
    a: &Tensor,
    b: &Tensor,
    c: &Tensor,
) -> Result<Tensor> {
    if !records(&[a, b, c]) {
        return a.apply_op3(b, c, op);
    }
    let y = run3(&op, a, b, c)?;
    let (a, b, c, saved) = (a.clone(), b.clone(), c.clone(), y.clone());
    push(op.name(), &y, move |grad, gradients| {
        let (da, db, dc) = op.bwd(&a, &b, &c, &saved, &grad.value)?;
        add_all([(&a, da), (&b, db), (&c, dc)], gradients)
    });
    Ok(y)
}

/// Computes the result of an operation of one input, to be recorded with [`push`].
pub(crate) fn run1(op: &impl CustomOp1, x: &Tensor) -> Result<Tensor> {
    run(x, |storage, layout| match storage {
        Storage::Cpu(x) => op.cpu_fwd(x, layout).map(on_cpu),
        Storage::Cuda(x) => op.cuda_fwd(x, layout).map(on_cuda),
        Storage::Metal(x) => op.metal_fwd(x, layout).map(on_metal),
    })
}

/// As [`run1`], of three inputs.
pub(crate) fn run3(op: &impl CustomOp3, a: &Tensor, b: &Tensor, c: &Tensor) -> Result<Tensor> {
    let ((b_storage, b_layout), (c_storage, c_layout)) =
        (b.storage_and_layout(), c.storage_and_layout());
    run(a, |storage, layout| {
        match (storage, &*b_storage, &*c_storage) {
            (Storage::Cpu(a), Storage::Cpu(b), Storage::Cpu(c)) => {
                op.cpu_fwd(a, layout, b, b_layout, c, c_layout).map(on_cpu)
            }
            (Storage::Cuda(a), Storage::Cuda(b), Storage::Cuda(c)) => op
                .cuda_fwd(a, layout, b, b_layout, c, c_layout)
                .map(on_cuda),
            _ => bail!("{}: the arguments are on different devices", op.name()),
        }
    })
}

/// Computes a result on the storage of the first input.
fn run(
    x: &Tensor,
    forward: impl FnOnce(&Storage, &Layout) -> Result<(Storage, Shape)>,
) -> Result<Tensor> {
    let (storage, layout): (StorageRef, _) = x.storage_and_layout();
    let (storage, shape) = forward(&storage, layout)?;
    Ok(output(storage, shape))
}

fn on_cpu((storage, shape): (CpuStorage, Shape)) -> (Storage, Shape) {
    (Storage::Cpu(storage), shape)
}

fn on_cuda((storage, shape): (CudaStorage, Shape)) -> (Storage, Shape) {
    (Storage::Cuda(storage), shape)
}

fn on_metal((storage, shape): (MetalStorage, Shape)) -> (Storage, Shape) {
    (Storage::Metal(storage), shape)
}

/// Adds what an operation gives for its inputs.
fn add_all<'a>(
    grads: impl IntoIterator<Item = (&'a Tensor, Option<Tensor>)>,
    gradients: &mut Gradients,
) -> Result<()> {
    for (x, grad) in grads {
        if let Some(grad) = grad {
            gradients.add(x, grad)?;
        }
    }
    Ok(())
}
