"""Time series, sound, text and control."""

from __future__ import annotations

import architectures as made
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812

from gallery.parts import Apply, Concat, Residual, Several, Specimen, cbr, mlp


class Last(nn.Module):
    """A recurrent layer of torch and a linear map of its last state."""

    def __init__(self, kind, features=2, hidden=4, **options) -> None:
        super().__init__()
        self.rnn, self.out = kind(features, hidden, batch_first=True, **options), nn.Linear(hidden, 1)

    def forward(self, x):
        return self.out(self.rnn(x)[0][:, -1])


class IndRNN(nn.Module):
    """Each state has a weight of its own (Li et al. 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.enter, self.u, self.out = nn.Linear(2, 5), nn.Parameter(torch.rand(5)), nn.Linear(5, 1)

    def forward(self, x):
        h = torch.zeros(5)
        for v in self.enter(x).unbind(1):
            h = torch.relu(v + self.u * h)
        return self.out(h)


class AntisymmetricRNN(nn.Module):
    """h + eps tanh((W - W' - gamma I) h + V x + b) (Chang et al. 2019)."""

    def __init__(self, eps=0.1, gamma=0.01) -> None:
        super().__init__()
        self.w, self.v, self.out = nn.Parameter(torch.randn(5, 5) / 5), nn.Linear(2, 5), nn.Linear(5, 1)
        self.eps, self.gamma = eps, gamma

    def forward(self, x):
        a = self.w - self.w.T - self.gamma * torch.eye(5)
        h = x.new_zeros(x.shape[0], 5)
        for t in range(x.shape[1]):
            h = h + self.eps * torch.tanh(h @ a.T + self.v(x[:, t]))
        return self.out(h)


class Oscillators(nn.Module):
    """coRNN: a network of damped oscillators (Rusch, Mishra 2021)."""

    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.Linear(2 + 4 + 4, 4), nn.Linear(4, 1)

    def forward(self, x):
        y = z = torch.zeros(len(x), 4)
        for t in range(x.size(1)):
            z = z + 0.1 * (torch.tanh(self.cell(torch.cat([x[:, t], z, y], 1))) - 1.0 * y - 0.5 * z)
            y = y + 0.1 * z
        return self.out(y)


class StateSpace(nn.Module):
    """S4D: a diagonal linear recurrence, its kernel written out as a convolution, and a GELU (Gu et al. 2022)."""

    def __init__(self, length=8, channels=3, states=4) -> None:
        super().__init__()
        self.log_a, self.b, self.c = (nn.Parameter(torch.randn(channels, states) / 2) for _ in range(3))
        self.d, self.length = nn.Parameter(torch.randn(channels)), length

    def forward(self, u):
        powers = torch.exp(-torch.exp(self.log_a)[..., None] * torch.arange(self.length) * 0.1)
        kernel = torch.einsum("cn,cn,cnl->cl", self.b, self.c, powers)
        y = F.conv1d(F.pad(u, (self.length - 1, 0)), kernel.flip(-1)[:, None], groups=u.shape[1])
        return F.gelu(y + self.d[:, None] * u)


class Reservoir(nn.Module):
    """Echo state network: a leaky random recurrence, fixed, and a linear read-out."""

    def __init__(self, size=8, leak=0.3) -> None:
        super().__init__()
        w = torch.randn(size, size)
        self.register_buffer("w", 0.9 * w / torch.linalg.eigvals(w).abs().max())
        self.register_buffer("w_in", torch.rand(size, 2) - 0.5)
        self.leak, self.out = leak, nn.Linear(size, 1)

    def forward(self, x):
        h = torch.zeros(x.size(0), len(self.w))
        for t in range(x.size(1)):
            h = torch.lerp(h, torch.tanh(x[:, t] @ self.w_in.T + h @ self.w.T), self.leak)
        return self.out(h)


class WaveNetBlock(nn.Module):
    def __init__(self, channels=3, dilation=2) -> None:
        super().__init__()
        self.pad, self.conv = dilation, nn.Conv1d(channels, 2 * channels, 2, dilation=dilation)

    def forward(self, x):
        a, b = self.conv(F.pad(x, (self.pad, 0))).chunk(2, 1)
        return x + torch.tanh(a) * torch.sigmoid(b)


class NBeats(nn.Module):
    """Blocks that explain a part of the series, take it away, and add to the forecast (Oreshkin et al. 2020)."""

    def __init__(self, back=8, ahead=3) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(mlp(back, 10, 10, last=True) for _ in range(2))
        self.backcast = nn.ModuleList(nn.Linear(10, back) for _ in range(2))
        self.forecast = nn.ModuleList(nn.Linear(10, ahead) for _ in range(2))

    def forward(self, x):
        forecast = 0.0
        for block, back, ahead in zip(self.blocks, self.backcast, self.forecast, strict=True):
            h = block(x)
            x, forecast = x - back(h), forecast + ahead(h)
        return forecast


class DLinear(nn.Module):
    """Trend by a moving average, remainder, a linear map of each (Zeng et al. 2023)."""

    def __init__(self, back=8, ahead=3) -> None:
        super().__init__()
        self.trend, self.rest = nn.Linear(back, ahead), nn.Linear(back, ahead)

    def forward(self, x):
        x = x.permute(0, 2, 1)
        trend = F.avg_pool1d(torch.cat([x[..., :1].repeat(1, 1, 2), x, x[..., -1:].repeat(1, 1, 2)], -1), 5, 1)
        return (self.trend(trend) + self.rest(x - trend)).permute(0, 2, 1)


class Fourier(nn.Module):
    """FNet's mixing of tokens: the real part of the Fourier transform over tokens and features."""

    def forward(self, x):
        return torch.fft.fft2(x, dim=(-2, -1)).real


class TextCNN(nn.Module):
    """Windows of several lengths over embeddings, the maximum over time (Kim 2014)."""

    def __init__(self, dim=4) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(1, 3, (k, dim)) for k in (2, 3, 4))
        self.fc = nn.Linear(9, 2)

    def forward(self, x):
        x = x.unsqueeze(1)
        x = [F.relu(conv(x)).squeeze(3) for conv in self.convs]
        return self.fc(torch.cat([F.max_pool1d(i, i.size(2)).squeeze(2) for i in x], 1))


def eegnet():
    """Temporal, then spatial depthwise, then separable convolutions (Lawhern et al. 2018)."""
    return nn.Sequential(
        nn.Unflatten(1, (1, 4)), nn.Conv2d(1, 3, (1, 5), padding="same", bias=False), nn.BatchNorm2d(3),
        nn.Conv2d(3, 6, (4, 1), groups=3, bias=False), nn.BatchNorm2d(6), nn.ELU(), nn.AvgPool2d((1, 2)), nn.Dropout(0.25),
        nn.Conv2d(6, 6, (1, 3), padding="same", groups=6, bias=False), nn.Conv2d(6, 4, 1, bias=False), nn.BatchNorm2d(4),
        nn.ELU(), nn.AvgPool2d((1, 2)), nn.Flatten(), nn.Linear(16, 2),
    )  # fmt: skip


class CRNN(nn.Module):
    """Speech and text lines: convolutions, then a bidirectional LSTM."""

    def __init__(self) -> None:
        super().__init__()
        self.cnn, self.rnn = nn.Sequential(cbr(1, 3), nn.MaxPool2d(2)), nn.LSTM(6, 4, bidirectional=True, batch_first=True)

    def forward(self, x):
        return self.rnn(self.cnn(x).permute(0, 3, 1, 2).flatten(2))[0]


def keywords():
    """DS-CNN: depthwise separable convolutions on a spectrogram."""
    blocks = [cbr(1, 4, (5, 3), (2, 1)), cbr(4, 4, groups=4), cbr(4, 6, 1), cbr(6, 6, groups=6), cbr(6, 6, 1)]
    return nn.Sequential(*blocks, nn.AvgPool2d((5, 6)), nn.Flatten(), nn.Linear(6, 4))


def quartz():
    def block():
        branch = [nn.Conv1d(4, 4, 5, padding=2, groups=4), nn.Conv1d(4, 4, 1), nn.BatchNorm1d(4)]
        return nn.Sequential(Residual(*branch, nn.ReLU(), *branch, shortcut=cbr(4, 4, 1, act=None, dims=1)), nn.ReLU())

    return nn.Sequential(cbr(3, 4, 5, 2, dims=1), block(), block(), nn.Conv1d(4, 5, 1))


def deepspeech():
    """Clipped ReLUs, min(max(x, 0), 20) (Hannun et al. 2014)."""
    return nn.Sequential(
        nn.Linear(6, 10), nn.Hardtanh(0, 20), nn.Linear(10, 10), Apply(lambda x: x.clamp(0, 20)), nn.Linear(10, 5)
    )


def raw_audio():
    """M5: a wide first convolution on the waveform (Dai et al. 2017)."""
    return nn.Sequential(
        cbr(1, 3, 9, 4, dims=1),
        nn.MaxPool1d(2),
        cbr(3, 4, 3, dims=1),
        nn.MaxPool1d(2),
        nn.AdaptiveAvgPool1d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    )


def inception_time():
    pool = nn.Sequential(nn.MaxPool1d(3, 1, 1), nn.Conv1d(2, 2, 1, bias=False))
    wide = nn.Sequential(
        nn.Conv1d(2, 2, 1, bias=False), Concat(*(nn.Conv1d(2, 2, k, padding="same", bias=False) for k in (3, 5, 9)))
    )
    block = nn.Sequential(Concat(wide, pool), nn.BatchNorm1d(8), nn.ReLU())
    return nn.Sequential(block, nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(8, 3))


class Dueling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.value, self.advantage = mlp(4, 12, last=True), mlp(12, 8, 1), mlp(12, 8, 3)

    def forward(self, x):
        h = self.trunk(x)
        a = self.advantage(h)
        return self.value(h) + a - a.mean(dim=-1, keepdim=True)


class TwinCritics(nn.Module):
    """The smaller of two estimates (SAC, TD3), of state and action in one."""

    def __init__(self) -> None:
        super().__init__()
        self.q1, self.q2 = mlp(6, 12, 12, 1), mlp(6, 12, 12, 1)

    def forward(self, x):
        return torch.min(self.q1(x), self.q2(x))


class PiecewiseAffine(nn.Module):
    """Explicit model predictive control as a difference of maxima of affine functions."""

    def __init__(self) -> None:
        super().__init__()
        self.plus, self.minus = nn.Linear(4, 5), nn.Linear(4, 5)

    def forward(self, x):
        u = self.plus(x).max(dim=1, keepdim=True).values - self.minus(x).max(dim=1, keepdim=True).values
        return torch.clamp(u, -1.0, 1.0)


class ClosedLoop(nn.Module):
    """Three steps of a linear plant under a saturated neural controller."""

    def __init__(self) -> None:
        super().__init__()
        self.controller = nn.Sequential(mlp(2, 8, 8, 1, act=nn.Tanh), nn.Hardtanh())
        self.register_buffer("a", torch.tensor([[1.0, 0.1], [0.0, 1.0]]))
        self.register_buffer("b", torch.tensor([[0.0], [0.1]]))

    def forward(self, x):
        for _ in range(3):
            x = x @ self.a.T + self.controller(x) @ self.b.T
        return x


class Experts(nn.Module):
    """A mixture of experts with a softmax gate."""

    def __init__(self) -> None:
        super().__init__()
        self.experts, self.gate = nn.ModuleList(mlp(4, 6, 2) for _ in range(3)), nn.Linear(4, 3)

    def forward(self, x):
        weights = torch.softmax(self.gate(x), -1)
        return torch.stack([expert(x) for expert in self.experts], -1).mul(weights.unsqueeze(1)).sum(-1)


class Ensemble(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.members = nn.ModuleList(mlp(4, 8, 2) for _ in range(3))

    def forward(self, x):
        return sum(member(x) for member in self.members) / len(self.members)


class WideAndDeep(nn.Module):
    """A linear model and a deep one side by side, the categories' embedding held fixed."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.wide, self.deep = (
            nn.Embedding(5, 3),
            nn.Linear(6, 1),
            nn.Sequential(nn.Linear(9, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1)),
        )
        self.register_buffer("category", torch.tensor([2]))

    def forward(self, x):
        e = self.embed(self.category).expand(x.shape[0], -1)
        return self.wide(x) + self.deep(torch.cat([x, e], 1))


def conv_big():
    """VNN-COMP's convBigRELU, a tenth as wide."""
    convs = [nn.Conv2d(1, 3, 3, 1, 1), nn.ReLU(), nn.Conv2d(3, 3, 4, 2, 1), nn.ReLU(), nn.Conv2d(3, 4, 3, 1, 1), nn.ReLU()]
    return nn.Sequential(
        *convs, nn.Conv2d(4, 4, 4, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10)
    )


WAVE, SERIES = (3, 16), (6, 2)
SERIES_MODELS = {
    "Elman network": Specimen(lambda: Last(nn.RNN), SERIES),
    "Elman network, unrolled": Specimen(made.UnrolledRNN, (5, 2)),
    "LSTM": Specimen(lambda: Last(nn.LSTM), SERIES),
    "GRU": Specimen(lambda: Last(nn.GRU), SERIES),
    "IndRNN": Specimen(IndRNN, SERIES),
    "Antisymmetric RNN": Specimen(AntisymmetricRNN, SERIES),
    "coRNN": Specimen(Oscillators, SERIES),
    "Echo state network": Specimen(Reservoir, SERIES),
    "State-space model S4D": Specimen(
        lambda: nn.Sequential(nn.Conv1d(2, 3, 1), StateSpace(), nn.Flatten(), nn.Linear(24, 2)), (2, 8)
    ),
    "TCN": Specimen(made.TCN, (8, 2)),
    "WaveNet": Specimen(lambda: nn.Sequential(nn.Conv1d(1, 3, 1), WaveNetBlock(), nn.Conv1d(3, 1, 1)), (1, 8)),
    "N-BEATS": Specimen(NBeats, (8,)),
    "DLinear": Specimen(DLinear, (8, 2)),
    "FNet without norms": Specimen(lambda: nn.Sequential(Residual(Fourier()), Residual(mlp(4, 8, 4, act=nn.GELU))), (3, 4)),
    "Transformer encoder": Specimen(made.TransformerBlock, (3, 8)),
    "Text CNN": Specimen(TextCNN, (6, 4)),
    "EEGNet": Specimen(eegnet, (4, 16)),
    "CRNN": Specimen(CRNN, (1, 4, 8)),
    "DS-CNN for keywords": Specimen(keywords, (1, 10, 6)),
    "QuartzNet": Specimen(quartz, WAVE),
    "DeepSpeech, clipped ReLU": Specimen(deepspeech, (6,)),
    "M5 on waveforms": Specimen(raw_audio, (1, 64)),
    "InceptionTime": Specimen(inception_time, (2, 12)),
    "Policy": Specimen(lambda: mlp(4, 16, 16, 2, act=nn.Tanh), (4,)),
    "Squashed Gaussian policy, mean": Specimen(
        lambda: Several(
            mlp(4, 12, 12, last=True),
            mean=nn.Sequential(nn.Linear(12, 2), nn.Tanh()),
            std=nn.Sequential(nn.Linear(12, 2), nn.Softplus()),
        ),
        (4,),
        "mean",
    ),
    "Actor-critic, value": Specimen(lambda: made.ActorCritic("named"), (8,), "value"),
    "Dueling Q-network": Specimen(Dueling, (4,)),
    "Twin critics": Specimen(TwinCritics, (6,)),
    "Nature DQN": Specimen(
        lambda: nn.Sequential(
            nn.Conv2d(4, 4, 8, 4),
            nn.ReLU(),
            nn.Conv2d(4, 6, 4, 2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(24, 16),
            nn.ReLU(),
            nn.Linear(16, 4),
        ),
        (4, 28, 28),
    ),
    "LSTM policy": Specimen(lambda: nn.Sequential(nn.Linear(4, 4), Last(nn.LSTM, 4)), (3, 4)),
    "Explicit MPC": Specimen(PiecewiseAffine, (4,)),
    "Closed loop, three steps": Specimen(ClosedLoop, (2,)),
    "ACAS Xu": Specimen(lambda: mlp(5, 50, 50, 50, 50, 50, 50, 5), (5,)),
    "MNIST FC 256 x 2": Specimen(lambda: nn.Sequential(nn.Flatten(), mlp(784, 256, 256, 10)), (1, 28, 28)),
    "convBig": Specimen(conv_big, (1, 16, 16)),
    "Ensemble": Specimen(Ensemble, (4,)),
    "Wide and deep": Specimen(WideAndDeep, (6,)),
    "Mixture of experts": Specimen(Experts, (4,)),
}
