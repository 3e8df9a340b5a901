"""How many bytes of tensors are alive at a time."""

import weakref

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class PeakBytes:
    """Largest number of bytes in tensors made inside, counted at every operation."""

    def __enter__(self):
        live, outer = {}, self
        outer.bytes = outer._now = 0

        def freed(key):
            outer._now -= live.pop(key)

        class Watch(TorchDispatchMode):
            def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
                result = function(*args, **(kwargs or {}))
                for tensor in result if isinstance(result, (tuple, list)) else (result,):
                    if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in live:
                        storage = tensor.untyped_storage()
                        key = storage._cdata
                        live[key] = storage.nbytes()
                        outer._now += live[key]
                        weakref.finalize(tensor, freed, key)
                outer.bytes = max(outer.bytes, outer._now)
                return result

        self.mode = Watch()
        self.mode.__enter__()
        return self

    def __exit__(self, *error):
        self.mode.__exit__(*error)
