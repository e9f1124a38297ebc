"""Which calls only look at a tensor, make a constant like it, write a text of it, or hand its numbers to Python."""

from __future__ import annotations

# Calls that read only shape, type and place of a tensor.
METADATA = frozenset({
    "size", "dim", "ndimension", "numel", "nelement", "stride", "storage_offset", "element_size", "is_floating_point",
    "is_complex", "is_contiguous", "get_device", "is_same_size", "result_type", "can_cast", "is_tensor", "is_inference",
    "is_signed", "is_conj", "is_neg", "is_storage", "type", "has_names", "__len__", "__hash__", "retain_grad", "register_hook",
    "is_shared", "is_pinned", "sym_size", "sym_numel", "sym_stride", "sym_storage_offset",
})  # fmt: skip
# Calls that write a text: for people, while a module is read, of the place instead of the number; else a branch may read it.
TEXTS = frozenset({"__repr__", "__format__", "__str__"})
# Calls that make a constant of the shape and type of a value, of a number that does not depend on the input.
FACTORIES = frozenset({
    "zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_tensor", "new_empty",
})  # fmt: skip
# Calls that hand a value to Python.
READS = frozenset({
    "__bool__", "__float__", "__int__", "__index__", "__complex__", "__contains__", "item", "tolist", "numpy", "__array__",
    "equal", "allclose", "is_nonzero", "__dlpack__",
})  # fmt: skip
