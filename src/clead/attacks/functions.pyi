# Written by docs/generate.py from the settings classes: change those, not this file.
from collections.abc import Callable
from typing import Any, Literal

from torch import Tensor, nn

PYTHON_DEFAULTS: dict[str, dict[str, Any]]

def apgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    loss: Literal["cross_entropy", "margin", "dlr"] = "cross_entropy",
    targets: int = 0,
    target_order: Literal["confidence", "malt"] = "confidence",
    eot: int = 1,
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Maximise a loss of the logits by projected gradient ascent that adapts its step size (arXiv:2003.01690, algorithm 1).

    Source: Croce & Hein 2020; for L1 Croce & Hein 2021, arXiv:2103.01208, algorithm 1 with exact projections and a radius that
    shrinks from 3 eps by way of 2 eps over the steps (section 3.3 there). An image leaves with its first misclassified point
    in the ball, so there is no best point to return besides.

    Departures: with more than one draw of a randomised model, an image is broken if at most half of the draws are right, and the
    best point is that of the largest mean loss; the authors look at the last draw only, and stop at a stroke of luck.
    Condition 1 holds with equality too, as in the authors' code. L1 needs 4 steps to shrink the radius.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: linf, l2 or l1.
        steps: gradient steps of each run (steps).
        restarts: runs per target, each from another random point (runs).
        loss: what is maximised; dlr needs 3 classes, and 4 with targets.
        targets: classes to aim at, the most likely wrong ones, at most K - 1; 0: away from the label (classes).
        target_order: which classes are aimed at: the most likely ones, or those that a model which were linear
            around the image would reach first (MALT, Melamed et al. 2024, arXiv:2407.02240), for which the
            gradients of up to 100 classes are taken; malt is no part of AutoAttack.
        eot: draws of a randomised model per step, whose gradients are averaged (draws).
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def cw(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | None = None,
    norm: str = "l2",
    steps: int = 1000,
    search_steps: int = 9,
    step_size: float = 0.01,
    weight: float = 0.001,
    target: int | Tensor | None = None,
) -> Tensor:
    """min_w ‖x′ − x‖₂² + c · max(z_y − max_{k≠y} z_k, 0) with x′ = (tanh w + 1) / 2, by Adam; c by binary search.

    Source: Carlini & Wagner 2017, arXiv:1608.04644, sections V-B (f_6), VI-A and VI-D, with confidence 0. As in the authors'
    code c is multiplied by 10 until a first success, and Adam stops where the loss no longer falls. The paper takes 10,000
    steps and restarts; the default here is 1,000 and one start.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: None: return the nearest found, however far; else only what lies within this radius, in pixel units of
            [0, 1].
        norm: l2, the only one.
        steps: Adam steps for one weight of the margin (steps).
        search_steps: weights of the margin that are tried per image (weights).
        step_size: Adam's step size (units of w, whose tanh is the image).
        weight: first weight c of the margin against the squared distance.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def deepfool(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | None = None,
    norm: str = "l2",
    steps: int = 50,
    overshoot: float = 0.02,
    candidates: int = 10,
) -> Tensor:
    """x ← x + |f_k| / ‖w_k‖_q^q · |w_k|^(q−1) · sign(w_k), the class k nearest by |f_k| / ‖w_k‖_q, until the class changes.

    Source: Moosavi-Dezfooli et al. 2016, arXiv:1511.04599, algorithm 2 and eq. 10-12; f_k = z_k − z_y and w_k = ∇f_k; q = 2
    for l2 and 1 for linf. Departures: every point is clipped to [0, 1], which the paper ignores; the overshoot applies to every
    point, not to the last only, and a step is 1e-4 longer, both as in the authors' code: else the path ends on the boundary.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: None: return the nearest found, however far; else only what lies within this radius, in pixel units of
            [0, 1].
        norm: linf or l2.
        steps: linearisations (steps).
        overshoot: part of the perturbation that is added to cross the boundary.
        candidates: other classes tried, those of largest logits; fewer if there are fewer.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def eot_pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 50,
    step_size: float | str | None = None,
    step_schedule: Literal["constant", "linear"] = "constant",
    restarts: int = 1,
    random_start: bool = True,
    keep: Literal["last", "best"] = "best",
    draws: int = 20,
    objective: str = "cross_entropy",
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """PGD on the expected objective of a randomised model (Athalye et al. 2018, arXiv:1802.00420, section 4.1).

    On a model that draws nothing it is PGD at ``draws`` times the cost.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: l0, l1, l2 or linf.
        steps: gradient steps (steps).
        step_size: length of a step, with falling steps of the first; none: 2.5 · eps / steps (Madry 2018), falling
            eps; for l0 eps, which leaves choosing pixels to the projection (pixels in [0, 1], in the threat's
            norm).
        step_schedule: steps of one size, or falling linearly: step t of n, from 0, is step_size · (1 - t / n).
        restarts: independent starts; the best point per image is kept (starts).
        random_start: start from a random point of the ball instead of the image itself.
        keep: which point of the path to return: the last, or the one of largest objective.
        draws: draws of the model per step, whose gradients are averaged (draws).
        objective: what is maximised: a name of ``clead.attacks.OBJECTIVES``, such as cross_entropy, margin or dlr.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; misclassified where the attack succeeded. Raises UserError on pixels outside [0,
        1], NaN, wrong labels, or settings out of their range.
    """

def fab(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 100,
    restarts: int = 1,
    targets: int = 9,
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Step to the nearest point of the linearised boundary, held near x (Croce & Hein 2020, arXiv:1907.02044, algorithm 1).

    With targets it is FAB-T (Croce & Hein 2020, arXiv:2003.01690, section 4): one run per target class, one gradient per step.

    Departures: a search ends for an image with its first adversarial point inside the ball, which leaves the set of broken images
    as it is. In a search every point beyond the ball is drawn back towards the image, as the paper draws back adversarial points,
    without asking which it is: one forward then both judges a point and gives its gradient, a third of the passes less, and the
    same images broke (or more, in L1) in every comparison (``benchmarks/autoattack.py``). The final search between the best image
    and x is a bisection, and only for ``minimal`` (the authors' AutoAttack has none).

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: linf, l2 or l1.
        steps: steps of each run (steps).
        restarts: runs per target, all but the first from a random point (runs).
        targets: classes to aim at, the most likely wrong ones, at most K - 1; 0: the nearest boundary at each step.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    random_start: bool = False,
    step_size: float | str | None = None,
    objective: str = "cross_entropy",
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """One ascent step: x + eps · sign ∇J(x) (Goodfellow et al. 2015, arXiv:1412.6572, section 4), in the geometry of the threat.

    With a random start, step_size = 1.25 is FGSM-RS of fast adversarial training (Wong et al. 2020, arXiv:2001.03994, algorithm 3).

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: l0, l1, l2 or linf.
        random_start: start from a random point of the ball instead of the image itself.
        step_size: multiples of eps; None: 1, or 1.25 with a random start (Wong et al. 2020, arXiv:2001.03994).
        objective: what is maximised: a name of ``clead.attacks.OBJECTIVES``, such as cross_entropy, margin or dlr.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; misclassified where the attack succeeded. Raises UserError on pixels outside [0,
        1], NaN, wrong labels, or settings out of their range.
    """

def fmn(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str | None = None,
    norm: str = "linf",
    steps: int = 100,
    step_size: float = 1.0,
    gamma: float = 0.05,
    target: int | Tensor | None = None,
) -> Tensor:
    """δ ← Π(δ + α·∇L/‖∇L‖₂) into the ball of radius ε; ε ← ε·(1 − γ) at an adversarial point and ε·(1 + γ) at another.

    Source: Pintor et al. 2021, arXiv:2102.12827, algorithm 1; L = max_{k≠y} z_k − z_y. Until a first adversarial point is
    found, ε is the estimated distance to the boundary, ‖δ‖_p + |L| / ‖∇L‖_q; for l0 ε moves by a pixel at least. The step α
    falls by a cosine to a hundredth, γ to 0.001.

    Departures: the projection is that onto ball ∩ box, and the estimate leaves out the gradient of pixels at the box's
    border. In the paper the box comes after the ball and takes away from a perturbation of the right size: images with many
    black and white pixels are often not broken at all. The estimate is taken times 1 + γ, because the path to a flat boundary
    would end just before it. l0 counts pixels, whatever their channels, as the threat does.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: None: return the nearest found, however far; else only what lies within this radius, in pixel units of
            [0, 1].
        norm: linf, l2, l1 or l0.
        steps: gradient steps (steps).
        step_size: length of the first step (Euclidean length over pixels in [0, 1]).
        gamma: part by which the ball shrinks or grows in the first step.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def mi_fgsm(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 10,
    step_size: float | str | None = None,
    decay: float = 1.0,
    objective: str = "cross_entropy",
    target: int | Tensor | None = None,
) -> Tensor:
    """g ← μ·g + ∇J / ‖∇J‖₁, x ← x + α·ascent(g) (Dong et al. 2018, arXiv:1710.06081, algorithm 1 and eq. 9).

    The paper clips nothing, because α = eps / steps cannot leave the ball; here every point is projected into ball ∩ box.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: l0, l1, l2 or linf.
        steps: gradient steps (steps).
        step_size: length of a step; none: eps / steps (Dong 2018) (pixels in [0, 1], in the threat's norm).
        decay: part of the collected direction that a step keeps; 0: no momentum.
        objective: what is maximised: a name of ``clead.attacks.OBJECTIVES``, such as cross_entropy, margin or dlr.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; misclassified where the attack succeeded. Raises UserError on pixels outside [0,
        1], NaN, wrong labels, or settings out of their range.
    """

def patch(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    size: float | str = "1/16",
    steps: int = 100,
    step_size: float | str = 0.05,
    stride: int = 2,
    restarts: int = 5,
    place: Literal["anywhere", "corner"] = "anywhere",
    object: str | None = None,
    seed: int = 0,
) -> Tensor:
    """Maximise the margin over the content and the place of one square patch per image.

    Source: the location-optimised patches of Rao et al. 2020, arXiv:2005.02313, section 3: random start, sign-gradient ascent on
    the pixels of the patch, and after each step a move of the patch, content included, by ``stride`` pixels in one random
    direction of four if it raises the objective. (Brown et al. 2017, arXiv:1712.09665, learn one patch for all images; this is one
    per image, the worst case.) Departures: the margin instead of the cross-entropy, whose gradient vanishes on a confident
    model; an image whose patch has just moved keeps its content for one step, as the gradient belongs to the place it has left;
    an image leaves the search when it falls.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        size: how large the square is: 8×8 of 32×32 by default (fraction of the image's area if below 1, else pixels
            of its side).
        steps: gradient steps per restart (steps).
        step_size: length of a step (pixels in [0, 1]).
        stride: how far the patch moves at once; 0: it stays where it started (pixels).
        restarts: independent random places and contents (starts).
        place: where it may be: anywhere, or in one of the four corners, where it stays.
        object: a class of masks, by name: the patch lies off its pixels, and these alone count; else all outside
            the patch.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; misclassified where the attack succeeded. Raises UserError on pixels outside [0,
        1], NaN, wrong labels, or settings out of their range.
    """

def pgd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 50,
    step_size: float | str | None = None,
    step_schedule: Literal["constant", "linear"] = "constant",
    restarts: int = 1,
    random_start: bool = True,
    keep: Literal["last", "best"] = "best",
    objective: str = "cross_entropy",
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Maximise the objective by projected gradient ascent (Madry et al. 2018, arXiv:1706.06083, eq. 2.1 and section 5).

    Steps whose size falls are ours: where a model has learnt to hide its gradient from steps of one size, as small networks do on
    MNIST at eps 0.3, they find what constant ones miss (docs/method.md, "Step sizes").

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: l0, l1, l2 or linf.
        steps: gradient steps (steps).
        step_size: length of a step, with falling steps of the first; none: 2.5 · eps / steps (Madry 2018), falling
            eps; for l0 eps, which leaves choosing pixels to the projection (pixels in [0, 1], in the threat's
            norm).
        step_schedule: steps of one size, or falling linearly: step t of n, from 0, is step_size · (1 - t / n).
        restarts: independent starts; the best point per image is kept (starts).
        random_start: start from a random point of the ball instead of the image itself.
        keep: which point of the path to return: the last, or the one of largest objective.
        objective: what is maximised: a name of ``clead.attacks.OBJECTIVES``, such as cross_entropy, margin or dlr.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; misclassified where the attack succeeded. Raises UserError on pixels outside [0,
        1], NaN, wrong labels, or settings out of their range.
    """

def pgd_cd(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    steps: int = 1000,
    step_size: float | str = "1/4",
    restarts: int = 1,
    loss: Literal["cross_entropy", "margin"] = "cross_entropy",
    detect: bool = True,
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Signed steps of one size, clipped to ball and box, until an image is misclassified, its path repeats itself, or steps end.

    Source: PGD with cycle detection (Doldo et al. 2025, arXiv:2503.19347). In L∞ a point decides the whole path after it, so a path
    that comes back to a point, to the last bit, visits no other points from there on: it cannot break the image, and leaving out
    the remaining steps changes no verdict. It holds for models that answer the same for the same image; for a randomised one set
    ``detect`` to false. Rounding of a model may depend on how many images it is given at once, and so may the path.

    Departure: the authors keep a hash of every point; here one point per image is remembered exactly, another one after a quarter
    of the steps so far, so no two points are ever taken for one another, and a cycle is found a little later.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: linf, the only one.
        steps: most gradient steps of each run (steps).
        step_size: length of a step (multiples of eps).
        restarts: runs, the first from the image itself, the others from random points (runs).
        loss: what is maximised.
        detect: leave an image where its path repeats itself; false: all steps, with the same verdicts.
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def rays(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    queries: int = 10000,
    seed: int = 0,
) -> Tensor:
    """Look for signs s ∈ {−1, 1}^D whose radius r(s) = inf {r : clip(x + r·s) is misclassified} is at most eps.

    Source: Chen & Gu 2020, arXiv:2006.12792, section 3. From s = (1, …, 1), one block of signs is turned at a time: all of them,
    then each half, each quarter, down to each value. One answer at the best radius so far says whether the turned ray is worth a
    binary search. Of an answer only the label is used, so that neither logits nor their scale can mislead the search.

    Departures: an image leaves at its first mistake inside eps; a ray worth searching is asked at eps next, and the binary search
    stays above it; the first signs are tried themselves; where turning any single value no longer helps, the search begins again
    at random signs, the only use of ``generator``.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: linf, the only one.
        queries: answers of the model per image, that to the clean image included (queries).
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def spatial(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    degrees: float = 30.0,
    pixels: float = 3.0,
    angles: int = 31,
    shifts: int = 5,
) -> Tensor:
    """max over a grid of (θ, δu, δv) of the margin of the image rotated by θ and shifted by (δu, δv).

    Source: Engstrom et al. 2019, arXiv:1712.02779, section 3: (u', v') = R(θ)(u, v) + (δu, δv), bilinear, black outside, and
    their grid of 31 angles in ±30° and 5 × 5 shifts in ±3 pixels (on CIFAR-10; about a tenth of the side). Exhaustive, since
    gradients are of little help here (their section 4). Departure: an image leaves the search at the first pair that it falls
    to, the largest transformations first; whether an image falls is the same.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        degrees: largest rotation to either side (degrees).
        pixels: largest shift in either direction, along each axis (pixels).
        angles: angles tried, evenly spaced; 1: no rotation (angles).
        shifts: shifts tried along each axis, evenly spaced; 1: no shift (shifts).

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; misclassified where the attack succeeded. Raises UserError on pixels outside [0,
        1], NaN, wrong labels, or settings out of their range.
    """

def square(
    model: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    eps: float | str,
    norm: str = "linf",
    queries: int = 5000,
    p_init: float = 0.8,
    restarts: int = 1,
    target: int | Tensor | None = None,
    seed: int = 0,
) -> Tensor:
    """Maximise max_{k≠y} z_k − z_y by random search over windows (Andriushchenko et al. 2020, arXiv:1912.00049, algorithm 1).

    The version of AutoAttack (Croce & Hein 2020, arXiv:2003.01690; L1: Croce & Hein 2021, arXiv:2103.01208): margin loss, schedule
    of the windows stretched to the queries. Departures: each image has signs, and in L2 and L1 windows, of its own, as in the paper
    (in L∞ all images of a batch have the same window at a query, as in the authors' code, so that convolutions need computing there
    only); a window may touch the last row and column; an L∞ proposal always changes something. The answers may come from any
    function of the images.

    Args:
        model: takes pixels in [0, 1], returns logits (B, K); left bit-identical.
        x: (B, C, H, W) float in [0, 1].
        y: (B,) int64 in [0, K).
        eps: radius in pixel units of [0, 1], a number or text such as ``"8/255"``; pixels for l0.
        norm: linf, l2 or l1.
        queries: answers of the model per image and restart, clean image and start included (queries).
        p_init: fraction of the image that the first windows cover.
        restarts: independent searches; only images still robust go into the next (searches).
        target: class to aim at, a number or (B,) int64; None: away from ``y``. Success is that the model predicts
            it. Images whose ``y`` is the target come back as they are, with a warning.
        seed: of all randomness, a model's own draws included; the global generators are restored.

    Returns:
        x_adv, (B, C, H, W) in [0, 1]; x itself where nothing was found. Raises UserError on pixels outside [0, 1], NaN,
        wrong labels, or settings out of their range.
    """

def attack_function(name: str, kind: Any) -> Callable[..., Tensor]: ...
def functions() -> dict[str, Callable[..., Tensor]]: ...
