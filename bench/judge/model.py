"""The judge: a convolutional and attending vision tower, a projector and a causal language model, all small.

The tower is trained with labels of its patches and with pairs of image and sentence (as CLIP is), then frozen, as in
LLaVA. Projector and language model then learn to answer from all visual tokens. Pruning is never seen in training.

Several questions share an image: their words stand behind its tokens in one sequence, and each attends to the image and
to its own question's earlier words only.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .scenes import COLOUR_NAMES, GRID, LENGTH, LETTERS, THINGS, WORD, WORDS

OWN_WORDS = 2.0  # added to the scores of a question's own words, in every head


@dataclass(frozen=True)
class Sizes:
    width: int = 128
    heads: int = 4
    tower_layers: int = 2
    layers: int = 3
    aligned: int = 64  # width of the space that images and sentences share


class Visual(NamedTuple):
    """What the tower gives: features (B, N, width), and the same tokens in the sentences' space (B, N, aligned)."""

    features: Tensor
    aligned: Tensor


def coordinates(grid: int, origins: Tensor) -> Tensor:
    """(B, 2) origins in the canvas -> (B, grid * grid, 2) rows and columns of the patches, in raster order."""
    line = torch.arange(grid)
    local = torch.stack(torch.meshgrid(line, line, indexing="ij"), -1).view(1, -1, 2)
    return local + origins[:, None, :]


def sines(position: Tensor, width: int) -> Tensor:
    """(..., 2) -> (..., width): sines and cosines of both coordinates."""
    rate = torch.exp(torch.linspace(math.log(math.pi), math.log(0.06), width // 4))
    angle = position[..., None].float() * rate
    return torch.cat([angle.sin(), angle.cos()], -1).flatten(-2)


class Rotary:
    """Rotations of the first `turned` columns of queries and keys by row and column; the others match by content."""

    def __init__(self, position: Tensor, turned: int) -> None:
        rate = torch.exp(torch.linspace(math.log(1.0), math.log(0.05), turned // 4))
        angle = (position[..., None].float() * rate).flatten(-2)  # (B, N, head / 2)
        self.cos = torch.cat([angle.cos()] * 2, -1)[:, None]
        self.sin = torch.cat([-angle.sin(), angle.sin()], -1)[:, None]

    def __call__(self, x: Tensor) -> Tensor:
        half = self.cos.shape[-1] // 2
        x, rest = x[..., : 2 * half], x[..., 2 * half :]
        turned = torch.cat([x[..., half:], x[..., :half]], -1)
        return torch.cat([x * self.cos.to(x.dtype) + turned * self.sin.to(x.dtype), rest], -1)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def queries(self, x: Tensor, rotary: Rotary) -> tuple[Tensor, Tensor, Tensor]:
        B, N, _ = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        return rotary(q), rotary(k), v

    def finish(self, x: Tensor, attended: Tensor) -> Tensor:
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))

    def forward(self, x: Tensor, rotary: Rotary) -> Tensor:
        return self.finish(x, F.scaled_dot_product_attention(*self.queries(x, rotary)))

    def answer(self, x: Tensor, rotary: Rotary, n: int, mask: Tensor, last: bool) -> Tensor:
        """x (B, n + text, width): image causally, text over the image and what `mask` allows of the text."""
        q, k, v = self.queries(x, rotary)
        self.seen = (q[:, 0, n:], k[:, 0, :n])
        text = F.scaled_dot_product_attention(q[:, :, n:], k, v, attn_mask=mask)
        if last:  # nothing reads the image any more
            return self.finish(x[:, n:], text)
        image = F.scaled_dot_product_attention(q[:, :, :n], k[:, :, :n], v[:, :, :n], is_causal=True)
        return self.finish(x, torch.cat([image, text], 2))


def convolution(width: int, to: int, stride: int) -> tuple[nn.Module, ...]:
    return nn.Conv2d(width, to, 3, stride, 1, bias=False), nn.BatchNorm2d(to), nn.GELU(approximate="tanh")


class Tower(nn.Module):
    def __init__(self, sizes: Sizes) -> None:
        super().__init__()
        self.width, self.heads = sizes.width, sizes.heads
        self.stem = nn.Sequential(
            *convolution(3, 32, 2),
            *convolution(32, 64, 2),
            *convolution(64, sizes.width, 1),
            *convolution(sizes.width, sizes.width, 1),
        )
        self.place = nn.Linear(sizes.width, sizes.width, bias=False)
        self.blocks = nn.ModuleList(Block(sizes.width, sizes.heads) for _ in range(sizes.tower_layers))
        self.norm = nn.LayerNorm(sizes.width)
        self.align = nn.Linear(sizes.width, sizes.aligned)
        self.words = nn.Embedding(len(WORDS), sizes.aligned)
        self.things = nn.Linear(sizes.width, THINGS)
        self.colours = nn.Linear(sizes.width, 1 + len(COLOUR_NAMES))
        self.scale = nn.Parameter(torch.tensor([2.0, -2.0]))

    def forward(self, images: Tensor, position: Tensor) -> Visual:
        """images (B, H, W, 3) uint8, position (B, N, 2)."""
        x = images.permute(0, 3, 1, 2).float().sub(128).div(64)
        x = self.stem(x.contiguous(memory_format=torch.channels_last)).flatten(2).mT
        x = x + self.place(sines(position, self.width))
        rotary = Rotary(position, self.width // self.heads)
        for block in self.blocks:
            x = block(x, rotary)
        x = self.norm(x)
        return Visual(x, self.align(x))

    def query(self, words: Tensor) -> Tensor:
        """(..., LENGTH) word ids -> (..., LENGTH, aligned): what relevance is taken against."""
        return self.words(words)

    def losses(
        self, visual: Visual, things: Tensor, colours: Tensor, sentences: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Patch labels (B, N), and one sentence (B, S) of word ids that is true of each image."""
        weight = torch.ones(THINGS)
        weight[0] = 0.2
        found = {
            "thing": F.cross_entropy(self.things(visual.features).flatten(0, 1).float(), things.flatten(), weight),
            "colour": F.cross_entropy(self.colours(visual.features).flatten(0, 1).float(), colours.flatten()),
        }
        if sentences is not None:
            known = sentences != 0
            spoken = (self.words(sentences) * known[..., None]).sum(1) / known.sum(1, keepdim=True)
            pooled = F.normalize(visual.aligned.float().mean(1), dim=-1)
            logits = pooled @ F.normalize(spoken.float(), dim=-1).mT * self.scale[0].exp() + self.scale[1]
            sign = 2 * torch.eye(len(logits)) - 1
            found["pair"] = -F.logsigmoid(sign * logits).sum(1).mean()
        return found


def missed(block: Block, match: Tensor) -> Tensor:
    """Mean negative log of the share of attention that a block's first head gives to the `match` (B, text, N)."""
    query, key = block.seen
    look = F.log_softmax((query @ key.mT).float() / math.sqrt(key.shape[-1]), -1)
    on = match.any(-1)
    return -look.masked_fill(~match, -math.inf)[on].logsumexp(-1).mean()


class Judge(nn.Module):
    def __init__(self, sizes: Sizes | None = None) -> None:
        super().__init__()
        self.sizes = sizes = sizes or Sizes()
        self.tower = Tower(sizes)
        width = sizes.width
        self.projector = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(approximate="tanh"), nn.Linear(2 * width, width)
        )
        self.place = nn.Linear(sizes.width, sizes.width, bias=False)
        self.words = nn.Embedding(len(WORDS), sizes.width)
        self.order = nn.Parameter(torch.randn(LENGTH, sizes.width) * 0.1)
        layers = [Block(sizes.width, sizes.heads) for _ in range(sizes.layers)]
        self.blocks = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(sizes.width)
        self.bias = nn.Parameter(torch.zeros(len(WORDS)))
        for block in layers:
            # Queries that begin as the keys do look for their like: a word finds its picture from the first step on.
            # What is looked at is passed on as it is: a name that was found can be said without learning to copy it.
            q, k, v = block.qkv.weight.data.chunk(3)
            k.copy_(q.mul_(1.5))
            block.out.weight.data.copy_(v.mT)
            nn.init.normal_(block.down.weight, std=0.02)
        nn.init.normal_(self.words.weight, std=0.3)

    def read(self, hidden: Tensor) -> Tensor:
        return hidden @ self.words.weight.mT.to(hidden.dtype) / math.sqrt(self.sizes.width) * 4 + self.bias

    def forward(self, tokens: Tensor, position: Tensor, words: Tensor) -> Tensor:
        """Projected tokens (B, N, width) at (B, N, 2), questions (B, Q, LENGTH) -> logits (B, Q, LENGTH, words).

        N may be any subset of an image's tokens, in raster order: each carries its place, as position ids do.
        """
        B, Q, T = words.shape
        N = tokens.shape[1]
        text = (self.words(words) + self.order).flatten(1, 2)
        image = tokens + self.place(sines(position, self.sizes.width))
        x = torch.cat([image, text.to(image.dtype)], 1)
        after = (GRID + torch.arange(T)).repeat(Q)[None, :, None].expand(B, -1, 2)
        rotary = Rotary(torch.cat([position, after], 1), self.sizes.width // self.sizes.heads // 2)
        which, when = torch.arange(Q).repeat_interleave(T), torch.arange(T).repeat(Q)
        own = (which[:, None] == which) & (when[:, None] >= when)
        # Unweighted, a handful of words would drown among the image's tokens, and nothing would flow between them.
        near = torch.where(own, OWN_WORDS, -math.inf)
        mask = torch.cat([torch.zeros(Q * T, N), near], 1).to(image.dtype)
        for n, block in enumerate(self.blocks):
            assert isinstance(block, Block)
            x = block.answer(x, rotary, N, mask, n == len(self.blocks) - 1)
        return self.read(self.norm(x)).view(B, Q, T, -1)

    def pointing(self, words: Tensor, answers: Tensor, things: Tensor, colours: Tensor) -> Tensor:
        """How little one head each of the first two layers looks at what it should, for the forward pass just made.

        The first layer's looks from a word at the tokens of that name, the second's, where a letter or digit is to be
        answered, at the tokens that show it. words and answers (B, Q, LENGTH), labels (B, N).
        """
        named = torch.tensor([-1] + [WORD[w] for w in (*LETTERS, *"0123456789")])[things][:, None]
        toned = torch.tensor([-1] + [WORD[w] for w in COLOUR_NAMES])[colours][:, None]
        said = words.flatten(1)[:, :, None]
        is_name = (said >= 1) & (said <= len(LETTERS) + len(COLOUR_NAMES))  # a number's first digit is no name
        match = is_name & ((said == named) | (said == toned))
        match = match | ((said == WORD["number"]) & (things > len(LETTERS))[:, None])
        first, second = self.blocks[0], self.blocks[1]
        assert isinstance(first, Block)
        assert isinstance(second, Block)
        return missed(first, match) + missed(second, answers.flatten(1)[:, :, None] == named)

    def grounding(self, tokens: Tensor, things: Tensor, colours: Tensor) -> Tensor:
        """How far the projected tokens on a tile are from its words, in the language model's own vocabulary."""
        on = (things > 0).nonzero(as_tuple=True)
        logits = F.log_softmax(self.read(tokens[on]).float(), -1)
        named = torch.tensor([0] + [WORD[w] for w in (*LETTERS, *"0123456789")])[things[on]]
        toned = torch.tensor([0] + [WORD[w] for w in COLOUR_NAMES])[colours[on]]
        tone = torch.where(toned > 0, logits.gather(1, toned[:, None])[:, 0], 0.0)
        return -(logits.gather(1, named[:, None])[:, 0] + tone).mean()
