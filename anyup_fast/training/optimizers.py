"""Optimizers of training: AdamW, and Muon for models whose weights are matrices, as AnyUp's are."""

import torch

MATRIX_SIDE = 32  # inputs and outputs from which on a weight counts as a matrix


class Muon(torch.optim.Optimizer):
    """Momentum whose every matrix is made orthogonal before it is taken as a step (Jordan et al. 2024).

    Steps have the size of AdamW's at the same rate: 0.2 in the root mean square (Liu et al., arXiv 2502.16982, section
    2.2). `torch.optim.Muon` is the same but for the number format of the orthogonalisation, bfloat16, which takes
    longer than the rest of a training step on CPUs without arithmetic of that kind; here it is the gradient's.

    Args:
        parameters: matrices (rows, columns).
        lr: learning rate. momentum: of Nesterov's kind.
    """

    def __init__(self, parameters, lr=1e-3, momentum=0.95):
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        """Change the matrices that have a gradient."""
        for group in self.param_groups:
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                mean = self.state[matrix].setdefault("mean", torch.zeros_like(matrix))
                mean.lerp_(matrix.grad, 1 - group["momentum"])
                step = orthogonal(matrix.grad.lerp(mean, group["momentum"]))
                matrix.sub_(step, alpha=0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonal(matrix):
    """About U V' of the singular value decomposition U S V', singular values between 0.7 and 1.2; 0 stays 0.

    By five rounds of the Newton-Schulz polynomial of Jordan et al. (2024).
    """
    x = matrix.T if len(matrix) > matrix.shape[1] else matrix
    x = x / x.norm().clamp_min(1e-20)
    for _ in range(5):
        square = x @ x.T
        x = 3.4445 * x + (2.0315 * square @ square - 4.775 * square) @ x
    return x.T if len(matrix) > matrix.shape[1] else x


class Optimizer:
    """AdamW; or `Muon` for the matrices and AdamW for everything else.

    Matrices are weights with `MATRIX_SIDE` inputs and outputs at least, convolutions flattened to (outputs, inputs),
    projections of queries and of keys apart. The rate comes with each step; weight decay is AdamW's alone.

    Args:
        model: `AnyUp`. kind: one of `config.OPTIMIZERS`. weight_decay: at least 0.
    """

    def __init__(self, model, kind, weight_decay):
        self.parameters = dict(model.named_parameters())
        self.matrices = []  # (parameter's name, rows of it, view of them)
        if kind == "muon":
            for name, parameter in self.parameters.items():
                rows = parameter.detach().flatten(1) if parameter.ndim > 1 else parameter.detach()[:0, None]
                if min(rows.shape) >= MATRIX_SIDE:
                    side = len(rows) // 3 if name.endswith("in_proj_weight") else len(rows)
                    parts = (slice(start, start + side) for start in range(0, len(rows), side))
                    self.matrices += [(name, part, torch.nn.Parameter(rows[part])) for part in parts]
        apart = {name for name, _, _ in self.matrices}
        rest = [parameter for name, parameter in self.parameters.items() if name not in apart]
        self.optimizers = [torch.optim.AdamW(rest, betas=(0.9, 0.999), weight_decay=weight_decay)]
        if self.matrices:
            self.optimizers.append(Muon(view for _, _, view in self.matrices))

    def step(self, lr):
        """Change the parameters by their gradients at the learning rate `lr`."""
        for name, rows, view in self.matrices:
            gradient = self.parameters[name].grad
            view.grad = None if gradient is None else gradient.flatten(1)[rows]
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()

    def zero_grad(self):
        """Gradients to zero. A parameter that once had one keeps it."""
        for parameter in self.parameters.values():
            if parameter.grad is not None:
                parameter.grad.zero_()

    def state_dict(self):
        """What `load_state_dict` takes."""
        had = [name for name, parameter in self.parameters.items() if parameter.grad is not None]
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers], "gradients": had}

    def load_state_dict(self, state):
        """Go on from the `state_dict()` of an equal run."""
        for optimizer, values in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        for name in state["gradients"]:
            self.parameters[name].grad = torch.zeros_like(self.parameters[name])
