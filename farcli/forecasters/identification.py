"""System identification: the quadratic loss whose known optimiser explains how a run began.

Each run is taken to descend a quadratic of its own, L(w) = L₀ + ½ (w − w*)ᵀ H (w − w*), by an update rule that is
known. Its gradient g = H (w − w*) carries minibatch noise of covariance (a + b·(L(w) − L₀))·H: noise proportional to
the loss and aligned with the Hessian, as in least squares. θ = (w*, Cholesky factor of H) is drawn from a Gaussian
that all runs share. Empirical Bayes: that Gaussian and the noise levels a, b are estimated on the training runs; a new
run's θ is then its most probable value given w_0 … w_n; the forecast runs the optimiser on.

    y_r = f(θ_r) + ε_r,  ε_r ~ N(0, Ω(θ_r; a, b)),  θ_r ~ N(μ, Σ),

with y the snapshots after w_0 (and, in training, the last target), f the mean of noisy simulations from w_0, and Ω
their covariance. f is linearised over the posterior's own width (statistical linearisation, Särkkä 2013, section 5.3):
an update like Adam's first, lr·sign(g), has no useful derivative at a point.

Where w_0 is all that is seen, some of the targets say what runs have in common, beginning with the one θ that explains
them best for all runs; and a new run's forecast is the mean over θ drawn from that: how far the optimiser gets from w_0
is known, though not where the run is going.

Source: noise ∝ loss × Hessian, Mori et al. (arXiv 2105.09557); empirical Bayes by EM, Dempster et al. (1977); least
squares by damped steps, Levenberg (1944) and Marquardt (1963), believed as Schwarz (1978).
Differs: none of the papers on forecasting weights identifies the system; this is ours (SCIENCE, section 7).

Shape suffixes: R runs, D coordinates, P = D + D(D + 1)/2 unknowns of a run, U updates, S simulations, N numbers
observed of a run, M numbers observed of all, Q candidates, H targets.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import torch
from torch import Tensor

from farcli.forecasters.update_rules import UpdateRule, roll

UNEXPLAINED = (ArithmeticError, torch.linalg.LinAlgError)  # pyright: ignore[reportPrivateImportUsage]
"""What is raised where no quadratic explains the runs."""

_SIMULATIONS, _FAR_SIMULATIONS = 64, 8
"""Noisy simulations of a prefix, and of the far longer way to the targets."""
_ROUNDS, _MOST_ROUNDS, _STEPS = 12, 40, 20
"""Rounds of EM, and where there is no noise; steps from the prior to a new run's θ."""
_SPREAD, _SPREAD_ALONE = 0.3, 0.1
"""How much the factors of H vary between runs at first, of the largest. Ends alone hardly show that any do: what is not
given then is not taken away again."""
_REACH = 0.3
"""Linearised over so many posterior standard deviations."""
_FACTORS = (0.1, 0.5, 1.0, 2.0)
"""What each noise level is tried at, in units of the last."""
_MOST_NOISE = 1.0
"""Largest b: that of batches of about two examples in linear regression."""
_STARTS = 256
"""Draws from the population: a new run's first θ is one of them, and its forecast the mean of theirs where w_0 is all
that is seen."""
_LOOKED_AT = 4
"""Targets that say what runs have in common, where w_0 is all that is seen: ends alone leave open whether a run goes
slowly or not far."""
_FEW = 10
"""Training runs up to which the others are identified anew without each, where w_0 is all that is seen: how errors on
runs left out compare with those on new ones was measured (`scripts/LOG.md`)."""
_AGAIN = 5_000
"""Runs times updates up to which that is worth its time: under a minute."""
_ROOM = 1 << 24
"""Numbers that forecasts may take at once: 128 MiB."""
_DAMPINGS, _TRIES, _SMALL, _GAIN = (1e-6, 1e-2, 1.0, 1e2, 1e4), 40, 1e-4, 1e-6
"""Least squares: dampings tried at each step; at most so many steps; differences, in units of each unknown; the part of
the squared error that a step must gain."""
_SHARES = (1.0, 0.5, 0.1, 0.01, 0.0)
"""A step is shortened to one of these, whichever explains best."""
_QUIET = 1e-3
"""Below this part of the largest noise levels training is taken for free of noise: more rounds then pay."""
_NARROWEST = 1e-6
"""Linearised over at least this part of a prior standard deviation."""
_TRUST = 3.0
"""A step goes at most so many prior standard deviations in any unknown."""
_SEED = 0x5EED


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """What was done, apart from the runs: the update rule, and after how many updates weights were looked at.

    Attributes:
        rule: the optimiser.
        seen: updates from w_0 to each later snapshot of the prefix; none where w_0 is all of it.
        targets: updates from w_0 to each target.
        precision: absolute rounding of what is stored.
    """

    rule: UpdateRule
    seen: tuple[int, ...]
    targets: tuple[int, ...]
    precision: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Population:
    """What runs have in common.

    Attributes:
        mean_RP: μ, the same for all runs, or each run's own: [R or 1, P].
        covariance_RPP: Σ, likewise.
        noise: (a, b).
    """

    mean_RP: Tensor
    covariance_RPP: Tensor
    noise: Tensor

    def of(self, runs: Tensor) -> "Population":
        """That of some of the runs, by position."""
        if len(self.mean_RP) == 1:
            return self
        return replace(self, mean_RP=self.mean_RP[runs], covariance_RPP=self.covariance_RPP[runs])


@dataclass(frozen=True, slots=True, kw_only=True)
class Identified:
    """The population of some training runs, and what they themselves turned out to be.

    Attributes:
        population: μ, Σ and noise levels.
        theta_RP: each training run's most probable θ.
        posterior_RPP: its covariance.
    """

    population: Population
    theta_RP: Tensor
    posterior_RPP: Tensor

    def without_each(self) -> Population:
        """For each training run the population that the others make: its share of the moments taken out."""
        runs = len(self.theta_RP)
        keep_RR = 1 - torch.eye(runs, dtype=torch.float64)
        mean_RP = keep_RR @ self.theta_RP / (runs - 1)
        covariance_RPP = torch.stack(
            [
                _moments(self.theta_RP[kept], self.posterior_RPP[kept])[1]
                for kept in (keep_RR[run].bool() for run in range(runs))
            ]
        )
        return replace(self.population, mean_RP=mean_RP, covariance_RPP=covariance_RPP)


def unpack(theta_RP: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """w* [..., D] and the lower factor C of H = C Cᵀ [..., D, D]."""
    row, column = torch.tril_indices(size, size)
    flat = theta_RP.new_zeros(*theta_RP.shape[:-1], size * size)
    flat[..., row * size + column] = theta_RP[..., size:]
    return theta_RP[..., :size], flat.unflatten(-1, (size, size))


def simulate(
    rule: UpdateRule,
    theta_RP: Tensor,
    start_RD: Tensor,
    marks: Sequence[int],
    noise: Tensor | None = None,
    draws_URD: Tensor | None = None,
) -> Tensor:
    """Run the optimiser on quadratics: weights after each count of updates in `marks`, [..., marks, D].

    Args:
        rule: the optimiser.
        theta_RP: the quadratics, [..., P].
        start_RD: w_0, broadcastable to [..., D].
        marks: increasing counts of updates.
        noise: (a, b), broadcastable; none without.
        draws_URD: standard normal numbers for each update.
    """
    size = start_RD.shape[-1]
    optimum_RD, factor_RDD = unpack(theta_RP, size)
    hessian_columns, factor_columns = (_columns(each) for each in (factor_RDD @ factor_RDD.mT, factor_RDD))

    def gradient(weights_RD: Tensor, count: int) -> Tensor:
        away_RD = weights_RD - optimum_RD
        gradient_RD = _times(hessian_columns, away_RD)
        if noise is None or draws_URD is None:
            return gradient_RD
        excess_R1 = 0.5 * (away_RD * gradient_RD).sum(-1, keepdim=True)
        kick_RD = _times(factor_columns, draws_URD[count - 1])
        return gradient_RD + (noise[0] + noise[1] * excess_R1).sqrt() * kick_RD

    return roll(rule, start_RD, marks, gradient)


def _columns(matrix_RDD: Tensor) -> list[Tensor]:
    return [column_RD.contiguous() for column_RD in matrix_RDD.unbind(-1)]


def _times(columns: Sequence[Tensor], vector_RD: Tensor) -> Tensor:
    """Matrix times vector, column by column: many times faster than batches of products of tiny matrices."""
    product_RD = columns[0] * vector_RD[..., :1]
    for index in range(1, len(columns)):
        product_RD = torch.addcmul(product_RD, columns[index], vector_RD[..., index : index + 1])
    return product_RD


@lru_cache(maxsize=8)
def _draws(updates: int, simulations: int, runs: int, size: int, salt: int) -> Tensor:
    """The same normal numbers every time, in pairs of opposite sign, so that their mean is 0: [U, S, R, D]."""
    generator = torch.Generator().manual_seed(_SEED + salt)
    half = torch.randn(updates, simulations // 2, runs, size, generator=generator, dtype=torch.float64)
    return torch.cat([half, -half], dim=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Local:
    """f near some θ: its value [R, N], slope [R, N, P], and the noise's covariance [R, N, N]."""

    value_RN: Tensor
    slope_RNP: Tensor
    noise_RNN: Tensor


def _simulated(
    rule: UpdateRule, theta: Tensor, start_RD: Tensor, marks: Sequence[int], noise: Tensor, simulations: int
) -> Tensor:
    """Noisy simulations [..., S, R, N] for θ of shape [..., R, P]."""
    runs, size = start_RD.shape
    draws_USRD = _draws(marks[-1], simulations, runs, size, len(marks))
    many = (*theta.shape[:-2], simulations, runs)
    return simulate(
        rule,
        theta[..., None, :, :].expand(*many, theta.shape[-1]),
        start_RD.expand(*many, size),
        marks,
        noise,
        draws_USRD,
    ).flatten(-2)


def _covariance(found_SRN: Tensor) -> Tensor:
    """Covariance over simulations, shrunk towards its diagonal as far as they are few."""
    simulations, numbers = found_SRN.shape[-3], found_SRN.shape[-1]
    deviation_SRN = found_SRN - found_SRN.mean(-3, keepdim=True)
    sample_RNN = torch.einsum("...srn,...srm->...rnm", deviation_SRN, deviation_SRN) / (simulations - 1)
    share = numbers / (numbers + simulations)
    return (1 - share) * sample_RNN + share * torch.diag_embed(sample_RNN.diagonal(dim1=-2, dim2=-1))


def _linearised(
    rule: UpdateRule,
    theta_RP: Tensor,
    start_RD: Tensor,
    marks: Sequence[int],
    noise: Tensor,
    width_RP: Tensor,
    simulations: int,
) -> _Local:
    unknowns = theta_RP.shape[-1]
    shift_PRP = torch.diag_embed(_REACH * width_RP).transpose(0, 1)
    around = torch.cat([theta_RP[None], theta_RP + shift_PRP, theta_RP - shift_PRP])
    found_KSRN = _simulated(rule, around, start_RD, marks, noise, simulations)
    mean_KRN = found_KSRN.mean(1)
    rise_PRN = mean_KRN[1 : unknowns + 1] - mean_KRN[unknowns + 1 :]
    slope_PRN = rise_PRN / (2 * _REACH * width_RP.T[..., None])
    return _Local(value_RN=mean_KRN[0], slope_RNP=slope_PRN.permute(1, 2, 0), noise_RNN=_covariance(found_KSRN[0]))


def _moments(theta_RP: Tensor, posterior_RPP: Tensor) -> tuple[Tensor, Tensor]:
    """μ and Σ of the population: full between coordinates of w*, independent otherwise, since runs are few."""
    unknowns = theta_RP.shape[-1]
    size = next(d for d in range(unknowns) if d + d * (d + 1) // 2 == unknowns)
    mean_P = theta_RP.mean(0)
    deviation_RP = theta_RP - mean_P
    raw_PP = deviation_RP.T @ deviation_RP / (len(theta_RP) - 1) + posterior_RPP.mean(0)
    covariance_PP = torch.diag(raw_PP.diagonal())
    covariance_PP[:size, :size] = raw_PP[:size, :size]
    # A floor, so that what all runs share is not held for known beyond rounding.
    scale_P = torch.where(mean_P == 0, 1.0, mean_P.abs())
    scale_P[size:] = theta_RP[:, size:].square().mean().sqrt()
    return mean_P, covariance_PP + torch.diag((1e-6 * scale_P).square())


def identify(experiment: Experiment, prefix_RCD: Tensor, truth_RHD: Tensor) -> Identified:
    """Estimate the population from training runs.

    Args:
        experiment: what was done.
        prefix_RCD: w_0 … w_n, float64.
        truth_RHD: weights at the targets, of which the last is looked at, and some more where w_0 is all that is seen.

    Raises:
        ArithmeticError: no population explains the runs: the estimate diverged.
    """
    alone, places = not experiment.seen, [len(experiment.targets) - 1]
    start_RD, seen_RN, final_RD = prefix_RCD[:, 0], prefix_RCD[:, 1:].flatten(1), truth_RHD[:, -1]
    runs, size = start_RD.shape
    if alone:  # evenly spread, the last among them
        places = sorted({-(-len(experiment.targets) * part // _LOOKED_AT) - 1 for part in range(1, _LOOKED_AT + 1)})
    marks = tuple(experiment.targets[place] for place in places)
    ends = _Observed(experiment, start_RD, marks, truth_RHD[:, places].flatten(1), _FAR_SIMULATIONS)
    first = ends if alone else _Observed(experiment, start_RD, experiment.seen, seen_RN, _SIMULATIONS)
    observed = (ends,) if alone else (first, ends)
    theta_RP, curvature = _first_guess(first, final_RD.mean(0).expand(runs, -1) if alone else final_RD)
    if alone:
        theta_RP = _common(ends, theta_RP[0], curvature).expand(runs, -1)
    spread = (_SPREAD_ALONE if alone else _SPREAD) * theta_RP[:, size:].abs().amax()
    spread_PP = torch.diag(spread.square().expand(theta_RP.shape[1])).clone()
    spread_PP[:size, :size] = torch.cov(final_RD.T) + experiment.precision**2 * torch.eye(size, dtype=torch.float64)
    excess = 0.5 * curvature * (start_RD - final_RD).square().sum(-1).mean()
    most = torch.stack([_MOST_NOISE * excess, torch.tensor(_MOST_NOISE, dtype=torch.float64)])
    population = Population(
        mean_RP=theta_RP.mean(0, keepdim=True),
        covariance_RPP=spread_PP[None],
        noise=torch.stack([0.03 * excess, torch.tensor(0.1, dtype=torch.float64)]),
    )
    width_RP = spread_PP.diagonal().sqrt().expand_as(theta_RP)
    posterior_RPP = spread_PP.expand(runs, -1, -1)
    for count in range(_MOST_ROUNDS):
        if count >= _ROUNDS and bool((population.noise > _QUIET * most).any()):
            break
        noise = _noise_level(first, theta_RP, population, width_RP, most)
        population = replace(population, noise=noise)
        theta_RP, posterior_RPP = _improved(theta_RP, width_RP, population, observed)
        width_RP = _width(posterior_RPP, population)
        mean_P, covariance_PP = _moments(theta_RP, posterior_RPP)
        population = replace(population, mean_RP=mean_P[None], covariance_RPP=covariance_PP[None])
    return Identified(population=population, theta_RP=theta_RP, posterior_RPP=posterior_RPP)


def infer(experiment: Experiment, population: Population, prefix_RCD: Tensor) -> tuple[Tensor, Tensor]:
    """The most probable θ [R, P] of runs that began like this, and its covariance [R, P, P].

    Raises:
        ArithmeticError: the estimate diverged.
    """
    start_RD, seen_RN = prefix_RCD[:, 0], prefix_RCD[:, 1:].flatten(1)
    runs = len(start_RD)
    # From μ and from the draw that explains a run best: of the two the more probable end.
    prefix = _Observed(experiment, start_RD, experiment.seen, seen_RN, _SIMULATIONS)
    both = _Observed(experiment, start_RD.repeat(2, 1), experiment.seen, seen_RN.repeat(2, 1), _SIMULATIONS)
    theta_RP = torch.cat([population.mean_RP.expand(runs, -1), _best_draw(population, prefix)])
    twice = replace(
        population,
        mean_RP=population.mean_RP.expand(runs, -1).repeat(2, 1),
        covariance_RPP=population.covariance_RPP.expand(runs, -1, -1).repeat(2, 1, 1),
    )
    posterior_RPP = twice.covariance_RPP
    for _ in range(_STEPS):
        theta_RP, posterior_RPP = _improved(theta_RP, _width(posterior_RPP, twice), twice, (both,))
    fixed_RNN = both.precision(both.linearised(theta_RP, _width(posterior_RPP, twice), population.noise))
    score_R = both.misfit(theta_RP[None], population.noise, fixed_RNN)[0] - torch.logdet(fixed_RNN)
    score_R = score_R + _form(theta_RP - twice.mean_RP, torch.linalg.inv(twice.covariance_RPP))
    chosen_R = torch.arange(runs) + runs * (score_R[runs:] < score_R[:runs])
    return theta_RP[chosen_R], posterior_RPP[chosen_R]


def forecast(experiment: Experiment, population: Population, prefix_RCD: Tensor) -> tuple[Tensor, Tensor]:
    """Run the optimiser on: weights at the targets, and their standard deviation, both [R, targets, D].

    The mean over noisy simulations from each run's most probable θ; their spread, and that of θ through the slope,
    make the standard deviation.

    Raises:
        ArithmeticError: the estimate diverged.
    """
    at_once = max(1, _ROOM // _numbers(experiment, prefix_RCD.shape[-1]))
    parts = torch.arange(len(prefix_RCD)).split(at_once)
    found = [_forecast(experiment, population.of(part), prefix_RCD[part]) for part in parts]
    weights_RHD, std_RHD = (torch.cat(each) for each in zip(*found, strict=True))
    _require_finite(weights_RHD, std_RHD)
    return weights_RHD, std_RHD


def _numbers(experiment: Experiment, size: int) -> int:
    """How many numbers the forecast of one run takes."""
    forecast = len(experiment.targets) * size
    if not experiment.seen:
        return 3 * _STARTS * forecast  # as they come, stacked, and less their mean
    simulations, unknowns = 2 * _FAR_SIMULATIONS, size + size * (size + 1) // 2
    return simulations * ((2 * unknowns + 1) * forecast + experiment.targets[-1] * size) + 3 * forecast**2


def forecast_left_out(
    experiment: Experiment, found: Identified, prefix_RCD: Tensor, truth_RHD: Tensor
) -> tuple[Tensor, Tensor]:
    """What `forecast` says of each training run, as far as it can be told without it.

    Args:
        experiment: what was done.
        found: what was identified on all of them.
        prefix_RCD: what `identify` got.
        truth_RHD: likewise.

    Raises:
        ArithmeticError: an estimate diverged.
    """
    runs, without = len(prefix_RCD), found.without_each()
    if experiment.seen or runs > _FEW or runs * experiment.targets[-1] > _AGAIN:
        return forecast(experiment, without, prefix_RCD)
    each = []
    for run in torch.arange(runs)[:, None]:
        others = torch.arange(runs) != run
        try:
            population = identify(experiment, prefix_RCD[others], truth_RHD[others]).population
            each.append(forecast(experiment, population, prefix_RCD[run]))
        except UNEXPLAINED:  # two runs may not tell what they have in common
            each.append(forecast(experiment, without.of(run), prefix_RCD[run]))
    weights_RHD, std_RHD = (torch.cat(part) for part in zip(*each, strict=True))
    return weights_RHD, std_RHD


def _forecast(experiment: Experiment, population: Population, prefix_RCD: Tensor) -> tuple[Tensor, Tensor]:
    start_RD = prefix_RCD[:, 0]
    if not experiment.seen:
        return _drawn(experiment, population, start_RD)
    theta_RP, posterior_RPP = infer(experiment, population, prefix_RCD)
    near = _linearised(
        experiment.rule,
        theta_RP,
        start_RD,
        experiment.targets,
        population.noise,
        _width(posterior_RPP, population),
        2 * _FAR_SIMULATIONS,
    )
    uncertain_RNN = near.slope_RNP @ posterior_RPP @ near.slope_RNP.mT + near.noise_RNN
    shape = (len(experiment.targets), start_RD.shape[-1])
    _require_finite(uncertain_RNN)
    std_RN = uncertain_RNN.diagonal(dim1=1, dim2=2).clamp(min=0).sqrt()
    return near.value_RN.unflatten(1, shape), std_RN.unflatten(1, shape)


def _drawn(experiment: Experiment, population: Population, start_RD: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation over draws of θ from the population, each simulated with noise of its own."""
    targets, size = experiment.targets, start_RD.shape[-1]
    standard_SP = _draws(1, _STARTS, 1, population.mean_RP.shape[-1], 0)[0, :, 0]
    factor_RPP = torch.linalg.cholesky(population.covariance_RPP)
    theta_SRP = population.mean_RP + torch.einsum("rpq,sq->srp", factor_RPP, standard_SP)
    many = (_STARTS, *start_RD.shape)
    found_SRHD = simulate(
        experiment.rule,
        theta_SRP.expand(*many[:2], -1),
        start_RD.expand(many),
        targets,
        population.noise,
        _draws(targets[-1], _STARTS, 1, size, len(targets)).expand(-1, *many),
    )
    return found_SRHD.mean(0), found_SRHD.std(0)


def _require_finite(*forecasts: Tensor) -> None:
    if not all(bool(part.isfinite().all()) for part in forecasts):
        raise ArithmeticError("the optimiser diverges on the quadratics that explain these runs")


@dataclass(frozen=True, slots=True, kw_only=False)
class _Observed:
    """Numbers [R, N] that were observed after the counts of updates in `marks`."""

    experiment: Experiment
    start_RD: Tensor
    marks: tuple[int, ...]
    numbers_RN: Tensor
    simulations: int

    def linearised(self, theta_RP: Tensor, width_RP: Tensor, noise: Tensor) -> _Local:
        return _linearised(self.experiment.rule, theta_RP, self.start_RD, self.marks, noise, width_RP, self.simulations)

    def precision(self, local: _Local) -> Tensor:
        """Ω⁻¹, rounding included: [R, N, N]; a target's noise is that of the average run."""
        noise_RNN = local.noise_RNN if self.marks == self.experiment.seen else local.noise_RNN.mean(0, keepdim=True)
        rounding_NN = self.experiment.precision**2 * torch.eye(noise_RNN.shape[-1], dtype=torch.float64)
        return torch.linalg.inv(noise_RNN + rounding_NN).expand(len(self.numbers_RN), -1, -1)

    def misfit(self, theta_QRP: Tensor, noise: Tensor, precision_RNN: Tensor) -> Tensor:
        """(y − f)ᵀ Ω⁻¹ (y − f) of candidates: [Q, R]."""
        found = _simulated(self.experiment.rule, theta_QRP, self.start_RD, self.marks, noise, self.simulations)
        return _form(self.numbers_RN - found.mean(-3), precision_RNN)


def _best_draw(population: Population, prefix: _Observed) -> Tensor:
    """Where to begin: of μ and draws from the population the θ that explains each run best.

    Under rules that look at a gradient's sign, a step from μ alone may end on the wrong side of it.
    """
    runs, unknowns = len(prefix.numbers_RN), population.mean_RP.shape[-1]
    draws_QRP = _draws(1, _STARTS, 1, unknowns, 0)[0].clone()
    draws_QRP[0] = 0
    factor_RPP = torch.linalg.cholesky(population.covariance_RPP)
    theta_QRP = population.mean_RP + (factor_RPP @ draws_QRP[..., None])[..., 0]
    theta_QRP = theta_QRP.expand(-1, runs, -1)
    local = prefix.linearised(
        theta_QRP[0], _width(population.covariance_RPP, population).expand(runs, -1), population.noise
    )
    spread_RNN = local.slope_RNP @ population.covariance_RPP @ local.slope_RNP.mT
    precision_RNN = torch.linalg.inv(spread_RNN * 1e-2 + torch.linalg.inv(prefix.precision(local)))
    quiet = replace(prefix, simulations=2)  # without noise all simulations are one
    objective_QR = quiet.misfit(theta_QRP, 0 * population.noise, precision_RNN)
    objective_QR = objective_QR + draws_QRP.square().sum(-1)
    return theta_QRP[torch.nan_to_num(objective_QR, nan=torch.inf).argmin(0), torch.arange(runs)]


def _form(vector: Tensor, matrix: Tensor) -> Tensor:
    return torch.einsum("...n,...nm,...m->...", vector, matrix, vector)


def _improved(
    theta_RP: Tensor, width_RP: Tensor, population: Population, observed: Sequence[_Observed]
) -> tuple[Tensor, Tensor]:
    """One Gauss–Newton step to each run's most probable θ, shortened until it helps; and the posterior covariance."""
    prior_RPP = torch.linalg.inv(population.covariance_RPP)
    curvature_RPP = prior_RPP.expand(len(theta_RP), -1, -1)
    pull_RP1 = prior_RPP @ (population.mean_RP - theta_RP)[..., None]
    precisions = []
    for part in observed:
        local = part.linearised(theta_RP, width_RP, population.noise)
        precisions.append(part.precision(local))
        weighed_RPN = local.slope_RNP.mT @ precisions[-1]
        curvature_RPP = curvature_RPP + weighed_RPN @ local.slope_RNP
        pull_RP1 = pull_RP1 + weighed_RPN @ (part.numbers_RN - local.value_RN)[..., None]
    posterior_RPP = _inverse(curvature_RPP)
    step_RP = (posterior_RPP @ pull_RP1)[..., 0]
    prior_std_RP = population.covariance_RPP.diagonal(dim1=-2, dim2=-1).sqrt()
    within_R1 = (_TRUST * prior_std_RP / step_RP.abs().clamp(min=1e-300)).amin(-1, keepdim=True).clamp(max=1)
    theta_QRP = theta_RP + torch.tensor(_SHARES, dtype=torch.float64)[:, None, None] * within_R1 * step_RP
    objective_QR = _form(theta_QRP - population.mean_RP, prior_RPP)
    for part, precision_RNN in zip(observed, precisions, strict=True):
        objective_QR = objective_QR + part.misfit(theta_QRP, population.noise, precision_RNN)
    best_R = torch.nan_to_num(objective_QR, nan=torch.inf).argmin(0)
    theta_RP = theta_QRP[best_R, torch.arange(len(theta_RP))]
    if not bool(theta_RP.isfinite().all() & posterior_RPP.isfinite().all()):
        raise ArithmeticError("no quadratic explains the runs")
    return theta_RP, posterior_RPP


def _inverse(symmetric_RPP: Tensor) -> Tensor:
    """Inverse of positive definite matrices whose unknowns have different units."""
    unit_RP = symmetric_RPP.diagonal(dim1=-2, dim2=-1).clamp(min=1e-300).rsqrt()
    scaled_RPP = symmetric_RPP * unit_RP[..., None] * unit_RP[..., None, :]
    values_RP, vectors_RPP = torch.linalg.eigh(scaled_RPP)
    inverse_RPP = (vectors_RPP / values_RP.clamp(min=1e-14)[..., None, :]) @ vectors_RPP.mT
    return inverse_RPP * unit_RP[..., None] * unit_RP[..., None, :]


def _width(posterior_RPP: Tensor, population: Population) -> Tensor:
    """Posterior standard deviations; never so small that differences drown in rounding."""
    prior_RP = population.covariance_RPP.diagonal(dim1=-2, dim2=-1).sqrt()
    return torch.maximum(posterior_RPP.diagonal(dim1=-2, dim2=-1).sqrt(), _NARROWEST * prior_RP)


def _noise_level(
    observed: _Observed, theta_RP: Tensor, population: Population, width_RP: Tensor, most: Tensor
) -> Tensor:
    """(a, b) of highest evidence among neighbours of the last: log N(y; f(μ), J Σ Jᵀ + Ω(a, b)), linearised at θ."""
    experiment, numbers_RN = observed.experiment, observed.numbers_RN
    local = observed.linearised(theta_RP, width_RP, population.noise)
    spread_RNN = local.slope_RNP @ population.covariance_RPP @ local.slope_RNP.mT
    spread_RNN = spread_RNN + experiment.precision**2 * torch.eye(numbers_RN.shape[1], dtype=torch.float64)
    shift_RN = (local.slope_RNP @ (population.mean_RP - theta_RP)[..., None])[..., 0]
    factors = torch.tensor(_FACTORS, dtype=torch.float64)
    candidates_Q2 = torch.cartesian_prod(factors * population.noise[0], factors * population.noise[1])
    candidates_Q2 = torch.minimum(candidates_Q2, most)
    found_QSRN = _simulated(
        experiment.rule,
        theta_RP.expand(len(candidates_Q2), -1, -1),
        observed.start_RD,
        observed.marks,
        candidates_Q2.T[:, :, None, None, None],
        observed.simulations,
    )
    residual_QRN = numbers_RN - found_QSRN.mean(1) - shift_RN
    factor_QRNN, _ = torch.linalg.cholesky_ex(spread_RNN + _covariance(found_QSRN))
    white_QRN = torch.linalg.solve_triangular(factor_QRNN, residual_QRN[..., None], upper=False)[..., 0]
    scale_QRN = factor_QRNN.diagonal(dim1=-2, dim2=-1)
    evidence_Q = -(0.5 * white_QRN.square() + scale_QRN.log()).sum((-2, -1))
    return candidates_Q2[torch.nan_to_num(evidence_Q, nan=-torch.inf).argmax()]


def _first_guess(observed: _Observed, optimum_RD: Tensor) -> tuple[Tensor, float]:
    """θ with these w* and H = h·1, and the h under which that explains best what was observed."""
    runs, size = optimum_RD.shape
    row, column = torch.tril_indices(size, size)
    best = (torch.inf, torch.empty(0), 1.0)
    for exponent in range(-12, 13):
        curvature = 10.0 ** (exponent / 4)
        factor_DD = curvature**0.5 * torch.eye(size, dtype=torch.float64)
        theta_RP = torch.cat([optimum_RD, factor_DD[row, column].expand(runs, -1)], dim=1)
        found_RN = simulate(observed.experiment.rule, theta_RP, observed.start_RD, observed.marks).flatten(1)
        error = float((found_RN - observed.numbers_RN).square().sum())
        if error < 0.999 * best[0]:  # rules that ignore the gradient's size leave h open: the first of equals
            best = (error, theta_RP, curvature)
    if not best[0] < torch.inf:
        raise ArithmeticError("the optimiser diverges on every quadratic")
    return best[1], best[2]


def _common(observed: _Observed, guess_P: Tensor, curvature: float) -> Tensor:
    """The one θ that explains all runs best, by least squares; the guess where that explains them nearly as well.

    An unknown counts in a unit of its own: w* in the distance from w_0 to its guess, the factor of H in √h. A shift by
    one unit weighs as much as an average residual: it stops what no run says anything of, as the size of H under rules
    that ignore the gradient's. So many unknowns also follow the noise of runs that have arrived: the gain must be more
    than Schwarz's criterion (1978) asks for them, with the numbers of a run counted once, whatever the targets; and
    these must be more than one and a half for each unknown.
    """
    start_RD, size = observed.start_RD, observed.start_RD.shape[-1]
    distance = (start_RD - guess_P[:size]).square().mean().sqrt()
    unit_P = torch.full_like(guess_P, curvature**0.5)
    unit_P[:size] = torch.where(distance > 0, distance, 1.0)

    def residuals(shift_QP: Tensor) -> Tensor:
        theta_Q1P = (guess_P + unit_P * shift_QP)[:, None]
        found_QRN = simulate(observed.experiment.rule, theta_Q1P, start_RD, observed.marks).flatten(-2)
        return (found_QRN - observed.numbers_RN).flatten(1)

    shift_P = torch.zeros_like(guess_P)
    small_PP = _SMALL * torch.eye(len(guess_P), dtype=torch.float64)
    for _ in range(_TRIES):
        now_M = residuals(shift_P[None])[0]
        slope_PM = (residuals(shift_P + small_PP) - residuals(shift_P - small_PP)) / (2 * _SMALL)
        variance = now_M.square().mean() + (_NARROWEST * unit_P[0]).square()
        curvature_PP = slope_PM @ slope_PM.T + variance * torch.eye(len(guess_P), dtype=torch.float64)
        pull_P = slope_PM @ now_M + variance * shift_P
        own_PP = torch.diag(curvature_PP.diagonal())
        step_QP = torch.stack([torch.linalg.solve(curvature_PP + part * own_PP, pull_P) for part in _DAMPINGS])
        next_QP = torch.cat([shift_P[None], shift_P - step_QP])
        error_Q = residuals(next_QP).square().sum(1) + variance * next_QP.square().sum(1)
        best = torch.nan_to_num(error_Q, nan=torch.inf).argmin()
        if not bool(error_Q[best] < (1 - _GAIN) * error_Q[0]):
            break
        shift_P = next_QP[best]
    error_Q = residuals(torch.stack([torch.zeros_like(shift_P), shift_P])).square().sum(1)
    numbers, unknowns = start_RD.numel(), len(guess_P)
    gains = bool(numbers * (error_Q[0] / error_Q[1]).log() > unknowns * math.log(numbers))
    return guess_P + unit_P * shift_P if gains and numbers > 1.5 * unknowns else guess_P
