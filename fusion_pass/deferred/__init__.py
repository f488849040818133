"""Deferred logits: a tensor that a compiled graph returns instead of logits, with the sources to compute them from.

| a graph returns logits, another takes them | `graph_outputs`, `graph_inputs`                      |
| the tensor, and what it knows              | `tensor`, `state`, `call_program`, `optimizer_steps` |
| what autograd sees of it                   | `history`                                            |
| what is active around a call               | `surroundings`, `checkpoint_regions`                 |
| a call on it: table, record, or answer     | `dispatch`, `op_tables`, `record`, `query`           |
| what the call amounts to, read as a graph  | `to_fx`, `lower`, `lower_tokenwise`, `results`       |
| numbers that are known already             | `shared_statistics`, `row_picks`                     |

The pass's rules read calls here as they read a Dynamo graph.

The contract ------------ A deferred tensor represents the tensor that eager code would have computed at the same call.
These are fixed at the call, whatever happens until it is read:

| what                    | how it is kept                                                                           |
|-------------------------|------------------------------------------------------------------------------------------|
| the operands' numbers   | operands are kept as other names of their memory (`state.as_leaf`), with versions        |
| the history             | those names have the gradient edges that the operands had: what is frozen, unfrozen,     |
|                         | detached or replaced later, or was made under ``no_grad``, changes no gradient           |
| grad and inference mode | each step is made, answered and read in the modes of its call (`call_program.Mode`)      |
| dtype and autocast      | recorded with the step; those of the graph are explicit casts in its program             |
| what sees ops           | making a tensor, and sweeps whose statistics are kept, run out of sight of dispatch      |
|                         | modes, hooks on saved tensors, and function transforms that are active at the read       |
| errors                  | a call that eager code refuses is refused at the call, with eager code's error           |

Operands of later steps that may be written to are copied. A call runs op by op on the numbers where its surroundings
give single ops a meaning (`surroundings`): a transform of ``torch.func``, a mode of stand-ins, a checkpointed region
that the logits came from outside of. It also does where an inference tensor would be saved for a gradient, and where
logits with a gradient have left the checkpointed region that made them: their gradient is of what the region computes
when it runs again, in the backward, as eager code's is. A loss in that region is fused, there and then.

Differences from eager code, none of them silent:

* ``StaleLogits``: numbers are needed, or a loss, after an operand was written to, freed, or stepped by an optimizer
  that wrote it. The message names the operand and the remedy. Nothing else raises it, but for a parameter that was
  given other memory (``p.data = t``) and written to there: torch counts versions of both together.
* the gradient of the logits themselves, first asked for after a loss was taken of them: an error with the remedy.
* names in ``grad_fn``, the class of the tensor (what `torch.nn.Parameter` and `torch.as_tensor` hand on included), weak
  references to it, hence ``torch.utils.swap_tensors``, and ``_is_view`` of what was not read yet.
* functions in C++ that take a tensor's memory before anything here runs raise torch's RuntimeError: ``Sub(z)`` and
  ``Tensor._make_subclass`` ("already associated to a python object") and ``torch.utils.dlpack.to_dlpack(z)`` ("Cannot
  access data pointer"). ``z.as_subclass(torch.Tensor)`` is the plain tensor, which they take. All else that takes
  numbers out works: ``numpy``, ``data_ptr``, ``__dlpack__``, ``from_dlpack``, copies, pickles, ``torch.save``, queues.
* a write through ``.data`` or by memory (numpy, a kernel) to an operand leaves no version. On the CPU it is noticed
  where it reaches one of 32 entries spread over the operand; elsewhere, and else, the numbers are the new ones.
* a part of logits that were written to (``a, b = z.chunk(2); z.mul_(2)``), used by C++ before Python (an autograd
  function, ``torch.func``, reentrant checkpointing): eager code refuses the use; here a backward raises its error.

Settings of arithmetic (precision of products, determinism, threads) are those of the read.
"""
