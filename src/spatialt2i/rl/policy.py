"""FLUX as a policy: a stock diffusers pipeline, a LoRA on its transformer, and log-probabilities of its steps.

Axes: P prompts, G images per prompt, T denoising steps, S latent tokens, C latent channels, B batch, L text tokens.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import FluxPipeline
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter

from spatialt2i.core.config import RLConfig
from spatialt2i.core.device import torch_dtype
from spatialt2i.core.run import atomic_path, seed_of
from spatialt2i.core.types import Prompt, Rollout
from spatialt2i.rl import sde

if TYPE_CHECKING:
    from PIL.Image import Image

# The recipe's targets, by their names in diffusers; single-stream blocks have only the first three [Flow-GRPO].
LORA_TARGETS = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj",
                "attn.add_v_proj", "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj",
                "ff_context.net.2"]
ADAPTER_FILE = "pytorch_lora_weights.safetensors"  # the name that `load_lora_weights` looks for
DRAWING = ("dtype", "resolution", "max_text_tokens", "guidance_scale", "eval_steps")  # settings that make a picture
CACHED_PROMPTS = 512  # a FLUX.1 prompt of 256 tokens takes 2 MB
VELOCITY_STD = 0.01  # of a step without noise, in the gate: an error of 0.00014 in v is a log ratio of 0.0001


class PromptError(ValueError):
    """A prompt that the text encoders cannot take."""


class FluxPolicy:
    """A FLUX pipeline whose denoising steps have log-probabilities, and whose adapter can be trained.

    The initial noise of a picture is what the stock pipeline draws in float32 (with ``rl.dtype`` "bfloat16" the stock
    one draws in that, hence another picture) from ``torch.Generator("cpu").manual_seed(seed)``; the noise of the steps
    comes from the same generator. So a picture depends on its prompt and seed, and on its batch by rounding at most.

    Attributes:
        name: the last part of the model's id or folder. settings: what its pictures depend on.
        pipeline: the stock pipeline; its transformer carries the adapter.
        sigmas: float32 [T+1], the schedule of rollouts.
    """

    def __init__(self, *, pipeline: FluxPipeline, config: RLConfig, device: torch.device, seed: int) -> None:
        """Attach a fresh adapter to ``pipeline``; see `from_pretrained`."""
        self.name = Path(config.model).name
        self.settings = {"model": config.model, **{name: getattr(config, name) for name in DRAWING}}
        self.pipeline = pipeline
        self._config = config
        self._device = device
        self._seed = seed
        cell = 2 * pipeline.vae_scale_factor  # pixels per latent token: FLUX packs 2 x 2 latent pixels into one
        if config.resolution % cell:
            raise ValueError(f"rl.resolution = {config.resolution}, expected a multiple of {cell} for {config.model}")
        for part in (pipeline.transformer, pipeline.vae, pipeline.text_encoder, pipeline.text_encoder_2):
            part.requires_grad_(False).eval()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            pipeline.transformer.add_adapter(LoraConfig(
                r=config.lora_rank, lora_alpha=config.lora_alpha, init_lora_weights="gaussian",
                target_modules=LORA_TARGETS))
        pipeline.to(device)
        self._parameters = {n: p for n, p in pipeline.transformer.named_parameters() if p.requires_grad}
        for parameter in self._parameters.values():
            parameter.data = parameter.data.float()  # an update of 1e-4 would be lost in bfloat16

        side = config.resolution // cell
        self._noise_shape = (pipeline.transformer.config.in_channels // 4, 2 * side, 2 * side)
        self._image_ids = pipeline._prepare_latent_image_ids(1, side, side, device, torch.float32)
        self._text_ids = torch.zeros(config.max_text_tokens, 3, device=device)
        self._noisy = range(0) if config.kernel == "ode" else sde.trained_steps(config)
        self.sigmas = self._schedule(config.rollout_steps)
        self._embeds: OrderedDict[str, tuple[Tensor, Tensor]] = OrderedDict()

    @classmethod
    def from_pretrained(cls, config: RLConfig, *, device: torch.device, seed: int) -> FluxPolicy:
        """Load ``config.model`` with the stock class and attach a fresh adapter that changes nothing yet.

        Args:
            config: model, dtype, adapter, schedule and sizes.
            device: where everything runs.
            seed: of the adapter's initial weights, and of what `log_prob` draws with kernel "ode".

        Raises:
            OSError: the folder or hub id cannot be loaded.
            ValueError: the settings do not fit the model.
        """
        try:
            pipeline = FluxPipeline.from_pretrained(config.model, dtype=torch_dtype(config.dtype))
        except OSError as error:
            raise OSError(f"cannot load rl.model = {config.model!r}, expected the hub id or folder of a FLUX pipeline "
                          f"(with model_index.json): {error}") from error
        return cls(pipeline=pipeline, config=config, device=device, seed=seed)

    # ---- drawing ----------------------------------------------------------------------------------------------------

    def sample(self, *, prompts: Sequence[Prompt], group: int, seeds: Sequence[Sequence[int]]) -> Rollout:
        """G trajectories for each of P prompts, in the training schedule. Pictures are left to `decode`.

        Args:
            prompts: the P prompts.
            group: G.
            seeds: [P][G].

        Returns:
            A rollout with latents [P, G, T+1, S, C] and log-probs [P, G, T] (NaN with kernel "ode"), and no images yet.

        Raises:
            PromptError: a prompt is empty or too long.
        """
        if len(seeds) != len(prompts) or any(len(row) != group for row in seeds):
            raise ValueError(f"seeds must be [{len(prompts)}][{group}], one per picture; "
                             f"got rows of {[len(row) for row in seeds]}")
        flat = [seed for row in seeds for seed in row]
        owners = [prompt for prompt in prompts for _ in range(group)]
        starts = [row[0] for row in seeds for _ in row] if self._config.same_start else flat
        parts = [self._denoise(prompts=owners[i:j], seeds=flat[i:j], starts=starts[i:j], sigmas=self.sigmas,
                               noisy=self._noisy)
                 for i, j in self._batches(len(flat))]
        latents, log_probs = (torch.cat(part).unflatten(0, (len(prompts), group)) for part in zip(*parts, strict=True))
        return Rollout(list(prompts), [], latents, log_probs, self.sigmas)

    def generate(self, *, prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Image]:
        """One RGB picture per prompt, without noise in the steps: what the stock pipeline draws.

        Args:
            prompts: B prompts.
            seeds: B seeds.
        """
        if len(seeds) != len(prompts):
            raise ValueError(f"got {len(prompts)} prompts and {len(seeds)} seeds, expected one seed per prompt")
        sigmas = self._schedule(self._config.eval_steps)
        images = []
        for i, j in self._batches(len(prompts)):
            latents, _ = self._denoise(prompts=prompts[i:j], seeds=seeds[i:j], starts=seeds[i:j], sigmas=sigmas,
                                       noisy=range(0))
            images += self._decode(latents[:, -1])
        return images

    def check(self, prompt: Prompt) -> None:
        """Refuse a prompt that T5 could not read whole; CLIP, which gives the pooled vector only, may cut it as ever.

        Raises:
            PromptError: the prompt is empty or longer than ``config.max_text_tokens``.
        """
        if not prompt.text.strip():
            raise PromptError(f"prompt {prompt.id!r} is empty, expected a text")
        tokens, limit = len(self.pipeline.tokenizer_2(prompt.text).input_ids), self._config.max_text_tokens
        if tokens > limit:
            raise PromptError(f"prompt {prompt.id!r} has {tokens} T5 tokens, expected at most rl.max_text_tokens = "
                              f"{limit}; shorten it or raise the limit (FLUX takes up to 512): {prompt.text!r}")

    def decode(self, rollout: Rollout) -> list[list[Image]]:
        """The pictures [P][G] at the ends of the trajectories."""
        groups, group = rollout.latents.shape[:2]
        last = rollout.latents[:, :, -1].flatten(0, 1)  # [P G, S, C]
        flat = [image for i, j in self._batches(len(last)) for image in self._decode(last[i:j])]
        return [flat[p * group:(p + 1) * group] for p in range(groups)]

    # ---- training ---------------------------------------------------------------------------------------------------

    def log_prob(self, *, rollout: Rollout, rows: Tensor, reference: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs with the current adapter, through the forward pass that drew: of single denoising steps, replayed.

        With kernel "ode", whose steps have no density: of the pictures, noised to the levels of those steps, with D
        noises each (``config.draws``). The noises are a function of run, prompt and step alone, hence the same for all
        images of a prompt, and what an advantage multiplies is how those differ.

        Args:
            rollout: where latents, prompts and schedule are.
            rows: int64 [B, 3] on the CPU: prompt, image and step of each transition. Steps may differ in a batch.
            reference: with the adapter off (the base model) and without gradient.

        Returns:
            log_prob [B]; mean of the transition [B, S, C], or the velocities [B, D S, C]; noise level [B], the kernel's
            s, or 1, which scales the KL.
        """
        if self._config.kernel == "ode":
            return self._picture_log_prob(rollout, rows, reference=reference)
        p, g, t = rows.unbind(1)
        now, then = rollout.sigmas[t], rollout.sigmas[t + 1]  # [B]
        x, x_next = rollout.latents[p, g, t], rollout.latents[p, g, t + 1]  # [B, S, C]
        v = self._predict(rollout, rows, x, reference=reference)
        law = {"sigma": now, "sigma_next": then, "noise": self._config.noise, "sigma_max": rollout.sigmas[1]}
        mean, std = sde.step_mean_std(self._config.kernel, x=x, v=v, **law)
        return sde.log_prob(x_next, mean=mean, std=std), mean, sde.noise_level(self._config.kernel, **law)

    def replay(self, *, rollout: Rollout, rows: Tensor, reference: bool = False) -> Tensor:
        """Log ratios of drawn denoising steps, replayed as in `log_prob`; all 0 where nothing changed since.

        With kernel "ode" a step is taken as the mean of a normal density of std `VELOCITY_STD` in v.

        Args:
            rollout, rows, reference: see `log_prob`.

        Returns:
            [B].
        """
        p, g, t = rows.unbind(1)
        if self._config.kernel != "ode":
            return self.log_prob(rollout=rollout, rows=rows, reference=reference)[0] - rollout.log_probs[p, g, t]
        x, x_next = rollout.latents[p, g, t], rollout.latents[p, g, t + 1]  # [B, S, C]
        drawn = (x_next - x) / (rollout.sigmas[t + 1] - rollout.sigmas[t])[:, None, None]
        error = (self._predict(rollout, rows, x, reference=reference) - drawn) / VELOCITY_STD
        return -0.5 * error.square().mean((1, 2))

    def parameters(self) -> dict[str, Parameter]:
        """The trainable parameters by name: the adapter's, in float32."""
        return self._parameters

    def save(self, folder: Path) -> None:
        """Write the adapter so that ``FluxPipeline.load_lora_weights(folder)`` loads it; replaces an earlier one."""
        transformer = self.pipeline.transformer
        # sorted, because the order of a set changes from process to process and the file's bytes must not
        metadata = {key: sorted(value) if isinstance(value, set) else value
                    for key, value in transformer.peft_config["default"].to_dict().items()}
        with atomic_path(folder / ADAPTER_FILE) as part:  # what a kill leaves there, the next save removes
            FluxPipeline.save_lora_weights(
                part.parent, weight_name=part.name, transformer_lora_layers=get_peft_model_state_dict(transformer),
                transformer_lora_adapter_metadata=metadata)
            _sort_metadata(part)

    def load(self, folder: Path) -> None:
        """Read what `save` wrote.

        Raises:
            OSError: the file is missing or damaged.
            ValueError: it is the adapter of another model or rank.
        """
        path = folder / ADAPTER_FILE
        try:
            saved = {key.removeprefix("transformer."): value for key, value in load_file(path).items()}
        except (OSError, SafetensorError) as error:
            raise OSError(f"cannot read the adapter {path}: {error}; expected a folder that `save` wrote") from error
        current = get_peft_model_state_dict(self.pipeline.transformer)
        shapes, expected = ({k: tuple(v.shape) for k, v in d.items()} for d in (saved, current))
        if shapes != expected:
            key = next(k for k in sorted(shapes | expected) if shapes.get(k) != expected.get(k))
            raise ValueError(f"{path} is the adapter of another model or rank: {key} is {shapes.get(key, 'missing')}, "
                             f"expected {expected.get(key, 'no such tensor')}; check rl.model and rl.lora_rank")
        set_peft_model_state_dict(self.pipeline.transformer, saved)

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _predict(self, rollout: Rollout, rows: Tensor, x: Tensor, *, reference: bool) -> Tensor:
        """The velocity [B, S, C] at latents x [B, S, C] of the prompts and steps of ``rows`` [B, 3]."""
        p, _, t = rows.unbind(1)
        embeds = self._encode([rollout.prompts[i] for i in p.tolist()])
        if not reference:
            return self._velocity(x, rollout.sigmas[t], embeds)
        with self._adapter_off(), torch.no_grad():
            return self._velocity(x, rollout.sigmas[t], embeds)

    def _picture_log_prob(self, rollout: Rollout, rows: Tensor, *, reference: bool) -> tuple[Tensor, Tensor, Tensor]:
        """`log_prob` for kernel "ode"."""
        draws = self._config.draws
        noise = self._forward_noise(rollout, rows)  # [B D, S, C]
        rows = rows.repeat_interleave(draws, 0)
        p, g, t = rows.unbind(1)
        x0, sigma = rollout.latents[p, g, -1], rollout.sigmas[t]
        v = self._predict(rollout, rows, sde.add_noise(x0, noise=noise, sigma=sigma), reference=reference)
        log_prob = sde.picture_log_prob(v, x0=x0, noise=noise).unflatten(0, (-1, draws)).mean(1)  # [B]
        return log_prob, v.unflatten(0, (-1, draws)).flatten(1, 2), torch.ones_like(log_prob)

    def _forward_noise(self, rollout: Rollout, rows: Tensor) -> Tensor:
        """Standard normal [B D, S, C], a function of the run's seed, the prompt's id, the step and the draw."""
        return self._noise([
            torch.Generator("cpu").manual_seed(seed_of(self._seed, "forward", rollout.prompts[p].id, t, draw))
            for p, _, t in rows.tolist() for draw in range(self._config.draws)])

    def _velocity(self, latents: Tensor, sigma: Tensor, embeds: tuple[Tensor, Tensor]) -> Tensor:
        """The transformer's v, float32 [B, S, C], at latents [B, S, C] and sigma [B]: the only forward pass."""
        transformer = self.pipeline.transformer
        text, pooled = embeds
        guidance = torch.full_like(sigma, self._config.guidance_scale) if transformer.config.guidance_embeds else None
        timestep = (sigma * 1000).to(text.dtype) / 1000  # rounds as the stock pipeline does
        v = transformer(hidden_states=latents.to(text.dtype), timestep=timestep, guidance=guidance,
                        pooled_projections=pooled, encoder_hidden_states=text, txt_ids=self._text_ids,
                        img_ids=self._image_ids, return_dict=False)[0]
        return v.float()

    @torch.no_grad()
    def _denoise(self, *, prompts: Sequence[Prompt], seeds: Sequence[int], starts: Sequence[int], sigmas: Tensor,
                 noisy: range) -> tuple[Tensor, Tensor]:
        """B trajectories: latents [B, T+1, S, C] and log-probs [B, T] (NaN at steps without noise).

        Seeds draw the noise of the steps, ``starts`` the initial noise.
        """
        embeds = self._encode(prompts)
        generators = [torch.Generator("cpu").manual_seed(seed) for seed in seeds]
        x = self._noise(generators)
        if starts != seeds:  # the draws above count: the noise of the steps is the same either way
            x = self._noise([torch.Generator("cpu").manual_seed(seed) for seed in starts])
        steps = len(sigmas) - 1
        latents = x.new_empty(len(x), steps + 1, *x.shape[1:])
        log_probs = x.new_full((len(x), steps), torch.nan)
        latents[:, 0] = x
        begun = [(prompt.text, start) for prompt, start in zip(prompts, starts, strict=True)]
        distinct = list(dict.fromkeys(begun))  # images of one prompt and start share their first velocity
        rows, owner = [begun.index(b) for b in distinct], [distinct.index(b) for b in begun]
        for t in range(steps):
            now, then = sigmas[t].expand(len(x)), sigmas[t + 1].expand(len(x))
            if t == 0:
                v = self._velocity(x[rows], now[rows], tuple(e[rows] for e in embeds))[owner]
            else:
                v = self._velocity(x, now, embeds)
            kernel = self._config.kernel if t in noisy else "ode"
            x, std = sde.step_mean_std(kernel, x=x, v=v, sigma=now, sigma_next=then, noise=self._config.noise,
                                       sigma_max=sigmas[1])
            if t in noisy:
                mean = x
                x = mean + std[:, None, None] * self._noise(generators)
                log_probs[:, t] = sde.log_prob(x, mean=mean, std=std)
            latents[:, t + 1] = x
        return latents, log_probs

    @torch.no_grad()
    def _decode(self, latents: Tensor) -> list[Image]:
        """RGB pictures of packed latents [B, S, C]."""
        pipeline, size, vae = self.pipeline, self._config.resolution, self.pipeline.vae
        z = pipeline._unpack_latents(latents.to(vae.dtype), size, size, pipeline.vae_scale_factor)
        pixels = vae.decode(z / vae.config.scaling_factor + vae.config.shift_factor, return_dict=False)[0]
        return pipeline.image_processor.postprocess(pixels, output_type="pil")

    @torch.no_grad()
    def _encode(self, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Text embeddings [B, L, D] and pooled embeddings [B, D'], each text encoded alone and once, then cached."""
        rows = []
        for prompt in prompts:
            if prompt.text not in self._embeds:
                self.check(prompt)
                text, pooled, _ = self.pipeline.encode_prompt(
                    prompt.text, device=self._device, max_sequence_length=self._config.max_text_tokens)
                self._embeds[prompt.text] = (text[0], pooled[0])
                if len(self._embeds) > CACHED_PROMPTS:
                    self._embeds.popitem(last=False)
            self._embeds.move_to_end(prompt.text)
            rows.append(self._embeds[prompt.text])
        return torch.stack([text for text, _ in rows]), torch.stack([pooled for _, pooled in rows])

    def _noise(self, generators: Sequence[torch.Generator]) -> Tensor:
        """Standard normal latents [B, S, C], one generator each; drawn on the CPU so that all devices see the same."""
        draws = torch.stack([torch.randn(self._noise_shape, generator=g) for g in generators])
        return self.pipeline._pack_latents(draws, *draws.shape).to(self._device)

    def _schedule(self, steps: int) -> Tensor:
        return sde.flux_sigmas(steps=steps, image_tokens=len(self._image_ids),
                               scheduler=self.pipeline.scheduler.config).to(self._device)

    def _batches(self, n: int) -> Iterator[tuple[int, int]]:
        return ((i, min(i + self._config.sample_batch, n)) for i in range(0, n, self._config.sample_batch))

    @contextmanager
    def _adapter_off(self) -> Iterator[None]:
        transformer = self.pipeline.transformer
        transformer.disable_adapters()
        try:
            yield
        finally:
            transformer.enable_adapters()


def _sort_metadata(path: Path) -> None:
    """Rewrite the header of a safetensors file, whose metadata come in random order: equal adapters are equal bytes."""
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # tensors start at a multiple of 8 bytes
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
