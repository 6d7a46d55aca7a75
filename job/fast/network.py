"""AlexNet's forward and backward pass at the speed of the GPU: convolutions and matrix products by cuDNN and cuBLAS on
the layouts they are fastest with, and everything between them fused into the Triton kernels of job.fast.kernels.

In: the network of job.network.alexnet, a batch of uint8 crops. Out: the loss, and the gradients of the network's
parameters, as autograd would give them (its plain twin, to which tests compare it). The ideas, measured in
README.md beside it:
- conv1 as a 3x3 convolution over 4x4 blocks of pixels (48 channels): tensor cores need many channels;
- a grouped convolution as one convolution per group, whose channels the kernel before wrote to a tensor of its own;
- bias, ReLU, pool and LRN in one pass over rows of channels; backward, a pool reads and never adds atomically;
- fc6 to fc8 (96 % of the parameters) in bf16 copies that the update writes, so that a step casts nothing;
- the whole step in two CUDA graphs: the gradients of fc6 to fc8 can be on the wire while the second runs.
"""

import torch
from torch import Tensor

from job.fast.batchnorm import BatchNorm, apply_slopes
from job.fast.operations import (
    SQUARE_TILE,
    as_rows,
    blocks_of,
    channels_last,
    convolution,
    convolution_backward,
    convolution_relu,
    convolutions_backward,
    pooled_size,
    power_of_two,
    reduction,
    tile,
    weight_gradient,
)
from job.network.alexnet import LRN_ALPHA, LRN_BETA, LRN_K, AlexNet
from job.network.sgd import aligned

_LRN = dict(LRN_K=LRN_K, LRN_ALPHA=LRN_ALPHA, LRN_BETA=LRN_BETA)
_IMAGE_PROGRAMS = 4  # Triton programs per image in kernels that also sum gradients of biases
_BLOCK = 4  # side of conv1's blocks in pixels: its stride


class Network:
    """Forward and backward pass of one network, of settings that it `lacks` nothing for, on batches of one size.

    `job.network.sgd.FusedSGD` keeps `copies` up to date. After any other change of the parameters, call its `refresh`.

    Args:
        model: its parameters are read, and get gradients (float32, contiguous) that stay where they are.
        batch: images per step.
        dtype: of activations and of the operands of convolutions and matrix products: bfloat16 or float32.
        graphs: record the pass as CUDA graphs; only on CUDA.

    Attributes:
        images: (batch, B, B, 48) of `dtype`, blocks of 4 x 4 pixels. `prepare` fills it, before `head`.
        labels: int64 (batch,). Fill it before `head`.
        loss: float32 scalar, the mean over the batch, after `head`.
        right: float32 scalar, the share of images whose label has the largest score, after `head`.
        copies: parameter -> its copy in `dtype`, for fc6 to fc8; empty in float32.
        head_gradients, tail_gradients: float32, 1-D: the memory that holds all gradients made by `head`, and by `tail`.
        frozen: the convolutions learn nothing; `tail` has nothing to do.
    """

    def __init__(self, model: AlexNet, batch: int, dtype: torch.dtype, graphs: bool = True):
        weight = model.conv1.weight
        device = weight.device
        self.model, self.batch, self.dtype = model, batch, dtype
        side = blocks_of(model.image_size)
        self.images = torch.zeros(batch, side, side, 48, device=device, dtype=dtype)
        self.labels = torch.zeros(batch, device=device, dtype=torch.int64)
        self.seed = torch.zeros(1, device=device, dtype=torch.int64)
        head = [p for name in ("fc8", "fc7", "fc6") for p in getattr(model, name).parameters()]
        own, self.frozen = set(map(id, head)), model.frozen
        self.head_gradients = _one_gradient(head)
        rest = [p for p in reversed(list(model.parameters())) if id(p) not in own]
        self.tail_gradients = self.head_gradients[:0] if self.frozen else _one_gradient(rest)
        self.copies: dict[torch.nn.Parameter, Tensor] = {}
        if dtype != torch.float32:
            for parameter in (model.fc6.weight, model.fc7.weight, model.fc8.weight):
                self.copies[parameter] = torch.empty_like(parameter, dtype=dtype)
        # Filters as the convolutions read them: rows of input channels. Written at the start of each pass.
        self._layers = model.conv2, model.conv3, model.conv4, model.conv5
        self._filters = [
            torch.empty_like(layer.weight, dtype=dtype, memory_format=torch.channels_last) for layer in self._layers
        ]
        self._filter1 = torch.empty(weight.shape[0], 3, 3, 48, device=device, dtype=dtype)
        self._padded1 = torch.zeros(weight.shape[0], 3, 12, 12, device=device)
        for parameter, copy in self.copies.items():
            copy.copy_(parameter.detach())
        self._norms: dict[str, BatchNorm] = {}
        if model.conv1.bias is None:
            half = model.conv4.weight.shape[0] // 2
            parts = {"1": slice(None), "2": slice(None), "3": slice(None), "5": slice(None)}
            self._norms = {name: BatchNorm(getattr(model, f"norm{name}"), part) for name, part in parts.items()}
            self._norms["4a"] = BatchNorm(model.norm4, slice(0, half))
            self._norms["4b"] = BatchNorm(model.norm4, slice(half, None))
        self._graphs: tuple | None = None
        if graphs and device.type == "cuda":
            self._record()

    def prepare(self, images: Tensor, offsets: Tensor, mirror: Tensor, mean: Tensor | None) -> Tensor:
        """`job.batches.device.prepare` into `self.images`. images: uint8 (batch, crop, crop, 3), or their planes."""
        from job.fast.kernels import prepare_blocks
        from job.fast.planes import prepare_planes

        height, width = (0, 0) if mean is None else mean.shape[:2]
        blocks = self.images.shape[1]
        kernel, values = (prepare_blocks, 12) if images.ndim == 4 else (prepare_planes, 4)
        kernel[(blocks, self.batch)](
            images, offsets, mirror.view(torch.uint8), images if mean is None else mean, self.images, height, width,
            CROP=self.model.image_size, BLOCKS=blocks, SIZE=power_of_two(values * blocks),
            MEAN=0 if mean is None else 1 if (height, width) == (1, 1) else 2,
        )  # fmt: skip
        return self.images

    # The two halves of a step.

    def head(self) -> None:
        """Forward pass, loss, gradients of fc6 to fc8."""
        if self._graphs:
            self._graphs[0].replay()
        else:
            self._head()

    def tail(self) -> None:
        """Gradients of the convolutions, unless they are frozen."""
        if self._graphs and not self.frozen:
            self._graphs[1].replay()
        elif not self.frozen:
            self._tail()

    def _record(self) -> None:
        """Record both halves as graphs that share their memory."""
        before = [(buffer, buffer.clone()) for buffer in self.model.buffers()]
        stream = torch.cuda.Stream(self.images.device)
        stream.wait_stream(torch.cuda.current_stream(self.images.device))
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles kernels, lets cuDNN choose
                self._head()
                if not self.frozen:
                    self._tail()
        torch.cuda.current_stream(self.images.device).wait_stream(stream)
        torch.cuda.synchronize(self.images.device)
        head, tail = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        # thread_local: Horovod's thread may use CUDA meanwhile.
        with torch.cuda.graph(head, capture_error_mode="thread_local"):
            self._head()
        if not self.frozen:
            with torch.cuda.graph(tail, pool=head.pool(), capture_error_mode="thread_local"):
                self._tail()
        self._graphs = head, tail
        for buffer, value in before:  # undo what the warm-up did to running statistics
            buffer.copy_(value)

    @torch.no_grad()
    def _head(self) -> None:
        model = self.model
        # Filters.
        self._padded1[:, :, :11, :11] = model.conv1.weight
        out = self._filter1.shape[0]
        self._filter1.view(out, 3, 3, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).copy_(self._padded1.view(out, 3, 3, 4, 3, 4))
        for filters, layer in zip(self._filters, self._layers, strict=True):
            filters.copy_(layer.weight)
        f2, f3, f4, f5 = self._filters

        # Convolutions. Each name that ends in `s` is a list of two tensors: the groups' halves of the channels.
        x0 = self.images.permute(0, 3, 1, 2)
        z1 = convolution(x0, self._filter1.permute(0, 3, 1, 2), 0)  # (N, 96, 55, 55)
        x1s, kept1 = self._pool_and_normalise([z1], "1", split=True)  # (N, 48, 27, 27) each
        z2s = [convolution(x, f, 2) for x, f in zip(x1s, f2.chunk(2), strict=True)]
        x2s, kept2 = self._pool_and_normalise(z2s, "2", split=False)  # (N, 256, 13, 13)
        z3 = convolution(x2s[0], f3, 1)  # (N, 384, 13, 13)
        x3s = self._bias_relu(z3, "3", split=True)
        z4s = x4s = None
        if self._norms:
            z4s = [convolution(x, f, 1) for x, f in zip(x3s, f4.chunk(2), strict=True)]
            x4s = [self._bias_relu(z, name)[0] for z, name in zip(z4s, ("4a", "4b"), strict=True)]
        else:
            biases4 = model.conv4.bias.to(self.dtype).chunk(2)
            x4s = [convolution_relu(x, f, b, 1) for x, f, b in zip(x3s, f4.chunk(2), biases4, strict=True)]
        z5s = [convolution(x, f, 1) for x, f in zip(x4s, f5.chunk(2), strict=True)]
        pooled5, kept5 = self._pool_last(z5s)  # (N, 9216)
        features, norm6 = self._normalise_features(pooled5)
        self._saved = x0, x1s, kept1, x2s[0], kept2, z3, x3s, z4s, x4s, kept5, pooled5, norm6

        # Classifier, and back.
        w6, w7, w8 = (self.copies.get(w, w.detach()) for w in (model.fc6.weight, model.fc7.weight, model.fc8.weight))
        h6 = torch.mm(features, w6.t())
        self._bias_relu_drop(h6, model.fc6.bias, 0)
        h7 = torch.mm(h6, w7.t())
        self._bias_relu_drop(h7, model.fc7.bias, 1)
        logits = torch.mm(h7, w8.t())
        self.loss, self.right = self._cross_entropy(logits, model.fc8.bias)
        d8 = logits  # its memory now holds the gradient
        torch.sum(d8, 0, dtype=torch.float32, out=model.fc8.bias.grad)
        weight_gradient(d8, h7, model.fc8.weight.grad)
        d7 = torch.mm(d8, w8)
        self._relu_backward([d7], [h7], d7, model.fc7.bias.grad, dropped=True)
        weight_gradient(d7, h6, model.fc7.weight.grad)
        d6 = torch.mm(d7, w7)
        self._relu_backward([d6], [h6], d6, model.fc6.bias.grad, dropped=True)
        weight_gradient(d6, features, model.fc6.weight.grad)
        if not self.frozen:
            self._d_features = torch.mm(d6, w6)

    @torch.no_grad()
    def _tail(self) -> None:
        model = self.model
        x0, x1s, kept1, x2, kept2, z3, x3s, z4s, x4s, kept5, pooled5, norm6 = self._saved
        f2, f3, f4, f5 = self._filters
        d_pooled5 = self._normalise_features_backward(self._d_features, pooled5, norm6)
        d5s = self._pool_last_backward(d_pooled5, kept5)
        d4s = convolutions_backward(d5s, x4s, f5, 1, model.conv5.weight.grad)
        if self._norms:
            for d, x, z, name in zip(d4s, x4s, z4s, ("4a", "4b"), strict=True):
                self._relu_backward([as_rows(d)], [as_rows(x)], as_rows(d), normalised=(self._norms[name], as_rows(z)))
        else:
            for d, x, bias in zip(d4s, x4s, model.conv4.bias.grad.chunk(2), strict=True):
                self._relu_backward([as_rows(d)], [as_rows(x)], as_rows(d), bias)
        d3s = convolutions_backward(d4s, x3s, f4, 1, model.conv4.weight.grad)
        d3 = torch.empty(*as_rows(x2).shape[:3], 2 * x3s[0].shape[1], device=x2.device, dtype=self.dtype)
        if self._norms:
            normalised = self._norms["3"], as_rows(z3)
            self._relu_backward([as_rows(d) for d in d3s], [as_rows(x) for x in x3s], d3, normalised=normalised)
        else:
            self._relu_backward([as_rows(d) for d in d3s], [as_rows(x) for x in x3s], d3, model.conv3.bias.grad)
        (d2,) = convolutions_backward([d3.permute(0, 3, 1, 2)], [x2], f3, 1, model.conv3.weight.grad)
        d2s = self._pool_and_normalise_backward([d2], kept2, "2", split=True)
        d1s = convolutions_backward(d2s, x1s, f2, 2, model.conv2.weight.grad)
        (d1,) = self._pool_and_normalise_backward(d1s, kept1, "1", split=False)
        filter1 = self._filter1.permute(0, 3, 1, 2)
        _, gradient, _ = convolution_backward(d1, x0, filter1, 0, needs_input=False)
        out = gradient.shape[0]
        gradient = gradient.permute(0, 2, 3, 1).reshape(out, 3, 3, 4, 4, 3).permute(0, 5, 1, 3, 2, 4)
        model.conv1.weight.grad.copy_(gradient.reshape(out, 3, 12, 12)[:, :, :11, :11])

    # What lies between the convolutions. Activations in memory: (N, H, W, C).

    def _new(self, n: int, height: int, width: int, channels: int) -> Tensor:
        """An activation (N, C, H, W) whose memory has the channels last."""
        return torch.empty(n, height, width, channels, device=self.images.device, dtype=self.dtype).permute(0, 3, 1, 2)

    def _before_relu(self, zs: list[Tensor], name: str) -> tuple[Tensor, Tensor]:
        """Scale (unused without batch normalisation) and bias per channel, between a convolution and its ReLU."""
        if name in self._norms:
            return self._norms[name].measure(zs)
        bias = getattr(self.model, f"conv{name}").bias.detach()
        return bias, bias

    def _pool_and_normalise(self, zs: list[Tensor], name: str, split: bool) -> tuple[list[Tensor], tuple]:
        """Bias, ReLU, max-pool, and LRN if any: outputs (two where `split`), and what the backward pass needs."""
        from job.fast.pooling import lrn_forward, pool_forward

        n, _, height, width = zs[0].shape
        channels = sum(z.shape[1] for z in zs)
        rows, block = tile(channels)
        before, after = self.model.lrn_place == "before-pool", self.model.lrn_place == "after-pool"
        affine = name in self._norms
        scale, bias = self._before_relu(zs, name)
        pooled = pooled_size(height), pooled_size(width)
        parts = 2 if split else 1
        outs = [self._new(n, *pooled, channels // parts) for _ in range(parts)]
        index = torch.empty(n, *pooled, channels, device=bias.device, dtype=torch.uint8)
        source = zs
        if before:
            normalised = self._new(n, height, width, channels)
            lrn_forward[(-(-n * height * width // rows),)](
                zs[0], zs[-1], scale, bias, normalised, n * height * width,
                C=channels, AFFINE=affine, SPLIT_IN=len(zs) == 2, **_LRN, R=rows, CB=block,
            )  # fmt: skip
            source = [normalised]
        pool_affine = affine and not before  # after LRN, the pool has nothing of the normalisation left to do
        kept = self._new(n, *pooled, channels) if after or pool_affine else outs[0]
        pool_forward[(-(-pooled[0] * pooled[1] // rows), n)](
            source[0], source[-1], scale, bias, kept, index, outs[0], outs[-1],
            H=height, W=width, C=channels, RELU=not before, AFFINE=pool_affine, LRN=after, PLANES=False,
            SPLIT_IN=len(source) == 2, SPLIT_OUT=split, **_LRN, R=rows, CB=block,
        )  # fmt: skip
        if self.model.lrn_place == "none" and not affine and split:
            kept = torch.cat(outs, 1)
        return outs, (zs, kept, index, scale, bias)

    def _pool_and_normalise_backward(self, ds: list[Tensor], saved: tuple, name: str, split: bool) -> list[Tensor]:
        """Gradients of what the convolution gave (two where `split`), from those of the outputs `ds`."""
        from job.fast.pooling import unpool_lrn

        zs, kept, index, scale, bias = saved
        n, _, height, width = zs[0].shape
        channels = index.shape[-1]
        parts = 2 if split else 1
        outs = [self._new(n, height, width, channels // parts) for _ in range(parts)]
        ds = [channels_last(d) for d in ds]
        if self.model.lrn_place != "before-pool":
            self._unpool(self._pooled_backward(ds, kept, index, scale, bias, name), index, zs, outs, name)
            return outs
        norm = self._norms.get(name)
        partial = torch.empty(2 if norm else 1, n * _IMAGE_PROGRAMS, channels, device=bias.device)
        rows, block = tile(channels, elements=SQUARE_TILE)
        unpool_lrn[(_IMAGE_PROGRAMS, n)](
            ds[0], ds[-1], index, zs[0], zs[-1], scale, bias, outs[0], outs[-1], partial,
            H=height, W=width, C=channels, AFFINE=norm is not None, SPLIT_D=len(ds) == 2, SPLIT=split, **_LRN,
            T=_IMAGE_PROGRAMS, R=rows, CB=block,
        )  # fmt: skip
        if norm:
            norm.backward(partial)
            for out, z, slopes in zip(outs, zs, norm.slopes.chunk(parts, 1), strict=True):
                apply_slopes(as_rows(out), as_rows(z), slopes.contiguous())
        else:
            torch.sum(partial[0], 0, out=getattr(self.model, f"conv{name}").bias.grad)
        return outs

    def _pooled_backward(
        self, ds: list[Tensor], kept: Tensor, index: Tensor, scale: Tensor, bias: Tensor, name: str, planes=False
    ) -> Tensor:
        """Gradients at the maxima, (N, PH, PW, C), through ReLU and LRN if any; and that of the bias."""
        from job.fast.pooling import pooled_backward

        n, height, width, channels = index.shape
        rows, block = tile(channels)
        norm = self._norms.get(name)
        partial = torch.empty(2 if norm else 1, n * _IMAGE_PROGRAMS, channels, device=bias.device)
        at_maxima = torch.empty_like(index, dtype=self.dtype)
        pooled_backward[(_IMAGE_PROGRAMS, n)](
            ds[0], ds[-1], kept, scale, bias, at_maxima, partial,
            P=height * width, C=channels, LRN=self.model.lrn_place == "after-pool" and not planes,
            AFFINE=norm is not None, PLANES=planes, SPLIT=len(ds) == 2, **_LRN, T=_IMAGE_PROGRAMS, R=rows, CB=block,
        )  # fmt: skip
        if norm:
            norm.backward(partial)
        else:
            torch.sum(partial[0], 0, out=getattr(self.model, f"conv{name}").bias.grad)
        return at_maxima

    def _unpool(self, at_maxima: Tensor, index: Tensor, zs: list[Tensor], outs: list[Tensor], name: str) -> None:
        """Backward of max-pooling, (N, PH, PW, C) gradients and places of the maxima, into one or two tensors."""
        from job.fast.pooling import unpool

        n, _, _, channels = index.shape
        height, width = outs[0].shape[2:]
        rows, block = tile(channels, elements=SQUARE_TILE)
        norm = self._norms.get(name)
        squares = -(-height // 2) * -(-width // 2)
        unpool[(-(-squares // rows), n)](
            at_maxima, index, zs[0], zs[-1], norm.slopes if norm else at_maxima, outs[0], outs[-1],
            H=height, W=width, C=channels, SPLIT=len(outs) == 2, AFFINE=norm is not None, R=rows, CB=block,
        )  # fmt: skip

    def _pool_last(self, zs: list[Tensor]) -> tuple[Tensor, tuple]:
        """Bias, ReLU and max-pool of the last convolution: features (N, C * H * W) in planes, as fc6 reads them."""
        from job.fast.pooling import pool_forward

        n, half, height, width = zs[0].shape
        channels = 2 * half
        rows, block = tile(channels)
        affine = "5" in self._norms
        scale, bias = self._before_relu(zs, "5")
        pooled = pooled_size(height), pooled_size(width)
        features = torch.empty(n, channels * pooled[0] * pooled[1], device=bias.device, dtype=self.dtype)
        index = torch.empty(n, *pooled, channels, device=bias.device, dtype=torch.uint8)
        kept = torch.empty_like(index, dtype=self.dtype) if affine else features
        pool_forward[(-(-pooled[0] * pooled[1] // rows), n)](
            zs[0], zs[1], scale, bias, kept, index, features, features,
            H=height, W=width, C=channels, RELU=True, AFFINE=affine, LRN=False, PLANES=True,
            SPLIT_IN=True, SPLIT_OUT=False, **_LRN, R=rows, CB=block,
        )  # fmt: skip
        return features, (zs, kept, index, scale, bias)

    def _pool_last_backward(self, d: Tensor, saved: tuple) -> list[Tensor]:
        zs, kept, index, scale, bias = saved
        outs = [self._new(*[zs[0].shape[i] for i in (0, 2, 3, 1)]) for _ in range(2)]
        self._unpool(self._pooled_backward([d], kept, index, scale, bias, "5", planes=True), index, zs, outs, "5")
        return outs

    def _normalise_features(self, x: Tensor) -> tuple[Tensor, tuple]:
        """Batch normalisation after the last pool, if the network has it. (N, C * H * W), channel by channel."""
        if not self._norms:
            return x, ()
        norm = self.model.norm6
        norm.num_batches_tracked += 1
        out, mean, inverse = torch.native_batch_norm(
            x.view(len(x), norm.num_features, -1), norm.weight, norm.bias, norm.running_mean, norm.running_var,
            True, norm.momentum, norm.eps,
        )  # fmt: skip
        return out.view_as(x), (mean, inverse)

    def _normalise_features_backward(self, d: Tensor, x: Tensor, saved: tuple) -> Tensor:
        if not self._norms:
            return d
        norm, (mean, inverse) = self.model.norm6, saved
        shape = len(x), norm.num_features, -1
        d_x, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            d.view(shape), x.view(shape), norm.weight, norm.running_mean, norm.running_var, mean, inverse,
            True, norm.eps, [True, True, True],
        )  # fmt: skip
        norm.weight.grad.copy_(d_weight)
        norm.bias.grad.copy_(d_bias)
        return d_x.view_as(x)

    def _bias_relu(self, z: Tensor, name: str, split: bool = False) -> list[Tensor]:
        """Bias or normalisation of a convolution's output, (N, C, H, W), and ReLU; in two halves if `split`."""
        from job.fast.kernels import bias_relu

        n, channels, height, width = z.shape
        parts = 2 if split else 1
        outs = [self._new(n, height, width, channels // parts) for _ in range(parts)]
        rows, block = tile(channels, most=512)
        scale, bias = self._before_relu([z], name)
        bias_relu[(-(-n * height * width // rows), -(-channels // block))](
            z, scale, bias, outs[0], outs[-1], self.seed, n * height * width,
            C=channels, SPLIT=split, DROP=0.0, AFFINE=name in self._norms, LAYER=0, R=rows, CB=block,
        )  # fmt: skip
        return outs

    def _bias_relu_drop(self, z: Tensor, bias: Tensor, layer: int) -> None:
        """ReLU of z + bias and dropout, (N, C), in place."""
        from job.fast.kernels import bias_relu

        n, channels = z.shape
        rows, block = tile(channels, most=512)
        bias_relu[(-(-n // rows), -(-channels // block))](
            z, bias, bias, z, z, self.seed, n,
            C=channels, SPLIT=False, DROP=self.model.dropout, AFFINE=False, LAYER=layer, R=rows, CB=block,
        )  # fmt: skip

    def _relu_backward(
        self,
        ds: list[Tensor],
        ys: list[Tensor],
        out: Tensor,
        bias_gradient: Tensor | None = None,
        dropped: bool = False,
        normalised: tuple | None = None,
    ) -> None:
        """Gradient of ReLU's input into `out`, and its sum over rows into `bias_gradient`. Tensors (..., C).

        normalised: the batch normalisation before ReLU and its input; then `out` is the gradient of that input.
        """
        from job.fast.kernels import relu_backward

        channels = out.shape[-1]
        total = out.numel() // channels
        rows, block = tile(channels, most=128)
        steps, programs = reduction(total, rows)
        norm, z = normalised or (None, out)
        partial = torch.empty(2 if norm else 1, programs, channels, device=out.device)
        relu_backward[(programs, -(-channels // block))](
            ds[0], ds[-1], ys[0], ys[-1], z, out, partial, total,
            C=channels, SPLIT=len(ds) == 2, AFFINE=norm is not None,
            SCALE=1 / (1 - self.model.dropout) if dropped else 1.0, STEPS=steps, R=rows, CB=block,
        )  # fmt: skip
        if norm is None:
            torch.sum(partial[0], 0, out=bias_gradient)
            return
        norm.backward(partial)
        apply_slopes(out, z, norm.slopes)

    def _cross_entropy(self, logits: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        """Mean loss and top-1 of a batch, (N, classes) logits without their bias; their memory gets the gradient."""
        from job.fast.kernels import cross_entropy

        n, classes = logits.shape
        losses, right = torch.empty(2, n, device=logits.device)
        cross_entropy[(n,)](
            logits, bias, self.labels, losses, right, logits, n, C=classes, CB=power_of_two(classes), num_warps=4
        )
        return losses.mean(), right.mean()


def _one_gradient(parameters: list[torch.nn.Parameter]) -> Tensor:
    """Give parameters gradients that are views of one tensor: it is sent as one message, without a copy."""
    sizes = [aligned(p.numel()) for p in parameters]
    flat = torch.zeros(sum(sizes), device=parameters[0].device)
    for parameter, part in zip(parameters, flat.split(sizes), strict=True):
        parameter.grad = part[: parameter.numel()].view(parameter.shape)
    return flat
