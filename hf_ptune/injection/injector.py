"""The one seam: an encoder's prompt, embeddings or prefix, meets a backbone here and nowhere else."""

import math
import re
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from hf_ptune.errors import BackboneError, InjectionError
from hf_ptune.injection import attention, embeddings, joint, own_attention, positions, sites
from hf_ptune.injection.bridge import bridge, checkpoint_layers, reentrant_layers, without_checkpointing
from hf_ptune.injection.calls import Slot, Threads, bind, parameters_of, transformed
from hf_ptune.injection.embeddings import InputPrompt
from hf_ptune.injection.head_window import HeadWindow, WindowedHead
from hf_ptune.injection.input_route import InputRoute
from hf_ptune.injection.interrupts import OnInterrupt
from hf_ptune.injection.kept_prompt import KeptPrompt
from hf_ptune.injection.layer_mix import LayerMix, ScalarMix
from hf_ptune.injection.merge import keep_masks
from hf_ptune.injection.outsiders import Lookout, set_aside
from hf_ptune.injection.placeholders import Placeholders
from hf_ptune.injection.pooling import MeanPooling
from hf_ptune.injection.probe import body_of, device_of, text_of
from hf_ptune.injection.recomputation import Recomputation, recomputations
from hf_ptune.injection.sites import Site
from hf_ptune.injection.trials import joining_agrees
from hf_ptune.methods.base import PromptEncoder, PromptKind, SiteShape, split_prefix
from hf_ptune.sharding import whole_for_backward

_ROTATES = re.compile("rotary|rope|sinusoidal", re.IGNORECASE)


class Injector:
    """Attach a prompt to a backbone, for as long as `detach` has not been called.

    Args:
        backbone: a loaded task model.
        geometry: what `find_geometry` said of it.
        prompt: the encoder.
        encode: calls it, with what the configuration adds: `[P, H]` or `[P, W]`.
        num_virtual_tokens: P.
        chosen: the sites that take a prefix.
        shift: whether own tokens stand P positions later.
        virtual_token_ids: where the sequence itself has a place for every virtual token: their ids, in order.
        pools_mean: whether the head of an encoder reads the mean of the own tokens in place of the first one.
        mix: of the states of all layers, where the head reads that in place of the last ones.
        window: of the states of a token's neighbours, where the head reads them too.
    """

    def __init__(
        self,
        backbone: PreTrainedModel,
        geometry: dict[str, Any],
        prompt: PromptEncoder,
        encode: Callable[[], Tensor],
        num_virtual_tokens: int,
        chosen: list[dict[str, Any]],
        shift: bool,
        virtual_token_ids: list[int] | None = None,
        pools_mean: bool = False,
        mix: ScalarMix | None = None,
        window: HeadWindow | None = None,
    ) -> None:
        self.backbone = backbone
        self.body = body_of(backbone)
        self.layers = checkpoint_layers(self.body)
        self.counters = positions.image_counters(self.body)
        self.causal: bool = geometry["causal"]
        self.kind = kind = prompt.kind
        self.encode = encode
        self.num_virtual_tokens = num_virtual_tokens
        self.shift = shift
        # prefix keys lie after the rotation, so that own tokens must not move with the pads before them
        rotary = any(_ROTATES.search(type(m).__name__) for m in self.body.modules())
        self.text = text_of(self.body, [c["name"] for c in geometry["sites"]])
        self.gives_positions = shift or (rotary and "position_ids" in parameters_of(self.text))
        self.table = positions.learned_table(self.body) if shift and not self.causal else None
        # a site of several layers adds up their gradients, for which half precision would be too coarse
        self.casts_at_once = len(geometry["sites"]) >= getattr(self.body.config, "num_hidden_layers", math.inf)
        self.moves_with_pads = rotary and self.causal and not self.gives_positions
        self.enabled = True
        self.within = Threads()  # in which the body runs
        self.busy = Threads()  # in which the prompt itself runs through it
        self.around = Slot()  # what the body around the text model was called with, while it runs
        self.layout = Slot()  # of prompt and rows, while they run as one sequence
        self.joins: bool | None = None  # whether they may; tried when the first batch trains
        self.trying = False  # while that is tried
        self.crossing: Callable[[Tensor], Tensor] | None = None
        self.handles: list[Any] = []
        self.watch = own_attention.Watch()
        self.lookout = Lookout(self.body, embeddings.word_embeddings(backbone))
        self.sites = [] if virtual_token_ids is not None else [self._site(c) for c in chosen]
        self.recomputations: list[Recomputation] = []
        self.bound: list[Recomputation] = []  # while a pass runs
        self.inputs: InputPrompt | None = None
        self.placeholders: Placeholders | None = None
        if virtual_token_ids is not None:
            reader = self.body.get_encoder() if embeddings.has_decoder(backbone) else self.body
            self.placeholders = Placeholders(reader, self.words(), virtual_token_ids, self._current_rows)
        elif kind is PromptKind.EMBEDDINGS and not self.causal:
            self.inputs = self._input_prompt()
        runs = kind is PromptKind.EMBEDDINGS and self.in_attention  # the prompt itself, through the body
        self.kept = KeptPrompt(prompt, backbone, self.body if runs else None)
        self._attach()
        if mix is not None:
            self.handles += LayerMix(self.body, mix, self._active, pools_mean).handles
        elif pools_mean:
            self.handles += MeanPooling(self.body, self.inputs, num_virtual_tokens, self._active).handles
        if window is not None:
            self.handles.append(WindowedHead(backbone, window, self._active, packs=self.causal))

    def _site(self, found: dict[str, Any]) -> Site:
        shape = SiteShape(found["heads"], found["key_dim"], found["value_dim"])
        which = found["name"], found["where"], found["layer"]
        return Site(*which, shape, found["product"], self.body.config, self.causal)

    @property
    def in_attention(self) -> bool:
        return self.inputs is None and self.placeholders is None

    def _input_prompt(self) -> InputPrompt:
        embed = self.words()
        if embeddings.has_decoder(self.backbone):
            return InputPrompt(self.body.get_encoder(), embed, index=0)
        return InputPrompt(self.body, embed, index=1)

    def words(self) -> nn.Module:
        """The word embeddings, among which a prompt stands."""
        words = embeddings.word_embeddings(self.backbone)
        if words is None or getattr(words, "quant_mode", None) is not None:
            raise BackboneError(
                f"{type(self.backbone).__name__} has no plain word embeddings among which a prompt could stand. "
                "Methods that work there: p_tuning_v2, prefix_tuning, bitfit."
            )
        return words

    def embedded(self, ids: Tensor) -> Tensor:
        """Embeddings `[..., H]` of tokens, as large as a prompt that stands for them starts."""
        found: Tensor = self.words()(ids) if self.inputs is None else self.inputs.embedded(ids)
        return found

    def _attach(self) -> None:
        add = self.handles.append
        add(self.body.register_load_state_dict_post_hook(self._forget))
        add(self.kept.prompt.register_load_state_dict_post_hook(self._forget))
        if self.placeholders is not None:
            self.handles += self.placeholders.handles
            return
        if self.in_attention:
            for site in self.sites:
                module = self.body.get_submodule(site.name)
                sites.place(module, site)
                self.watch.add(module)
            self.recomputations = recomputations(self.body)
            self.install()
            add(self.body.register_forward_pre_hook(self._before_body, with_kwargs=True, prepend=True))
            add(self.body.register_forward_hook(self._after_body, always_call=True))
            add(OnInterrupt(self.body, self._end, self._enter))
            if self.gives_positions or self.moves_with_pads:
                add(self.text.register_forward_pre_hook(self._before_text, with_kwargs=True))
            words = embeddings.word_embeddings(self.backbone)
            if words is not None:
                add(words.register_forward_hook(self._after_words))
            if embeddings.has_decoder(self.backbone):
                # generate runs the encoder by itself, before its first step
                encoder = self.body.get_encoder()
                add(encoder.register_forward_pre_hook(self._before_part, with_kwargs=True))
                add(encoder.register_forward_hook(self._after_part, always_call=True))
            return
        assert self.inputs is not None
        route = InputRoute(self.backbone, self.inputs, self.num_virtual_tokens, self._current_rows, self._active)
        self.handles += route.handles

    def install(self) -> None:
        """Make the attention functions that the backbone uses now see the prefixes."""
        for module in self.backbone.modules():
            config = getattr(module, "config", None)
            name = getattr(config, "_attn_implementation", None)
            if name not in (None, "eager"):
                attention.install(name)
        self.watch.follow()

    def _active(self) -> bool:
        return self.enabled and not self.busy

    def detach(self) -> None:
        """Give the backbone back as it was."""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        if self.in_attention:
            self.watch.stop()
            for site in self.sites:
                sites.remove(self.body.get_submodule(site.name))

    def _before_body(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy:
            return None
        self._end()  # a pass that was interrupted in a hook before it
        keep_masks(True)
        try:
            named = self._meet(bind(module, args, kwargs)) if self.enabled else None
            if self.text is not self.body:
                self.around.put(named)
            return self._begin(named)
        except BaseException:
            self._end()
            raise

    def _enter(self) -> None:
        if not self.busy:
            self.within.enter()

    def _begin(self, named: dict[str, Any] | None) -> Any:
        """Let a pass begin with the arguments that the prompt has met; `None` where it is turned off."""
        if named is None:
            self.fill(None)
        self._bind_checkpoints()
        return None if named is None else ((), named)

    def _meet(self, named: dict[str, Any]) -> dict[str, Any]:
        """Let the prompt meet a call of the body."""
        if self._may_join(named):
            prompt = self.kept.make_anew(self.encode)
            named, layout = joint.join(named, prompt, self.words(), self._shifted_positions(named, named))
            self.layout.put(layout)
            joint.begin(layout)
            self.fill(None)
            return named
        return self._fill_from_prompt(named)

    def _fill_from_prompt(self, named: dict[str, Any]) -> dict[str, Any]:
        pairs = self._current_pairs()
        if torch.is_grad_enabled() and self._reentrant():
            pairs = self._bridged(pairs, named)
        self.fill(pairs)
        return named

    def _before_text(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.busy or not self.enabled or self.layout.look() is not None:
            return None
        named = bind(module, args, kwargs)
        around = named if self.text is self.body else self.around.take() or named
        if self.gives_positions and not (named.get("input_ids") is None and named.get("inputs_embeds") is None):
            named["position_ids"] = self._shifted_positions(named, around)
        mask = named.get("attention_mask")
        if self.moves_with_pads and isinstance(mask, Tensor) and mask.dim() == 2 and not bool(mask[:, 0].all()):
            raise InjectionError(
                f"{type(module).__name__} counts positions from the pads and takes no position_ids: left padding would "
                'move the tokens away from the prompt. Set tokenizer.padding_side = "right".'
            )
        return (), named

    def _after_body(self, module: nn.Module, args: Any, output: Any) -> Any:
        layout = self._end()
        return None if layout is None or output is None else joint.part(output, layout)  # none where it has raised

    def _end(self) -> joint.Layout | None:
        """Leave nothing of a pass of the body; how prompt and rows were laid out in it, where they were."""
        if self.busy:
            return None
        self.within.leave()
        if self.text is not self.body:
            self.around.take()
        keep_masks(False)
        self._free_checkpoints()
        self.crossing = None
        layout: joint.Layout | None = self.layout.take()
        if layout is not None:
            joint.begin(None)
        return layout

    def _before_part(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.within or self.busy:
            return None
        return self._begin(self._fill_from_prompt(bind(module, args, kwargs)) if self.enabled else None)

    def _after_part(self, module: nn.Module, args: Any, output: Any) -> None:
        if not self.within:
            self._free_checkpoints()

    def _bind_checkpoints(self) -> None:
        """Let what the pass that begins has checkpointed run again with its own prefixes."""
        self._free_checkpoints()  # those of a pass that went down
        if self.backbone.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            if self.recomputations and not self.recomputations[-1].stands_in(self.body):
                self.recomputations = recomputations(self.body)
            self.bound = [r for r in self.recomputations if r.begin()]

    def _free_checkpoints(self) -> None:
        while self.bound:
            self.bound.pop().end()

    def fill(self, pairs: list[tuple[Tensor, Tensor]] | None) -> None:
        """Hand every site its prefix for the pass that begins."""
        if self.watch.follow():
            self.install()
        for number, site in enumerate(self.sites):
            site.fill(None if pairs is None else pairs[number])

    def _current_pairs(self) -> list[tuple[Tensor, Tensor]]:
        """The prefix of every site."""
        dtype = self.backbone.dtype
        return self.kept.get(self._pairs, lambda pairs: [(_apart(k, dtype), _apart(v, dtype)) for k, v in pairs])

    def _current_rows(self) -> Tensor | None:
        """The prompt `[P, H]`, or `None` while it is turned off."""
        if not self.enabled:
            return None
        return self.kept.get(self.encode, lambda rows: _apart(rows, self.backbone.dtype))

    def _forget(self, module: nn.Module, incompatible: Any) -> None:
        """Let the prompt be made anew from weights that have been loaded."""
        self.kept.forget()

    def _pairs(self) -> list[tuple[Tensor, Tensor]]:
        encoded = self.encode()
        if self.kind is PromptKind.PREFIX:
            if self.casts_at_once:
                encoded = encoded.to(self.backbone.dtype)
            return split_prefix(encoded, [s.shape for s in self.sites])
        return self.run_prompt(encoded)

    def run_prompt(self, prompt: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Turn a prompt `[P, H]` into keys and values by one pass of the backbone with batch 1."""
        accepted = parameters_of(self.body)
        words = self.words()
        device, dtype = device_of(words), next(words.parameters()).dtype
        dtype = dtype if dtype.is_floating_point else prompt.dtype
        inputs: dict[str, Any] = {"inputs_embeds": prompt.to(device, dtype)[None]}
        if "position_ids" in accepted and self.text is self.body:  # what is around the text counts as it does for rows
            inputs["position_ids"] = torch.arange(prompt.shape[0], device=device)[None]
        if "use_cache" in accepted:
            inputs["use_cache"] = False
        return self.record(inputs)

    def record(self, inputs: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        """Run the body and keep every site's keys and values `[K, P, D]`."""
        self.fill(None)
        for site in self.sites:
            site.recording = True
        try:
            aside = set_aside(self.body) if self.lookout.sees() else nullcontext()
            with self.busy.here(), without_checkpointing(self.layers), aside, positions.of_text_alone(self.counters):
                self.body(**inputs)
            for site in self.sites:
                site.check_recorded()
                if site.recorded is not None:
                    whole_for_backward(self.body, site.name, site.recorded)
            return [s.recorded for s in self.sites if s.recorded is not None]
        finally:
            for site in self.sites:
                site.recording, site.recorded = False, None

    def _may_join(self, named: dict[str, Any]) -> bool:
        if self.kind is not PromptKind.EMBEDDINGS or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        if transformed() or self.lookout.sees():
            return False
        if self.backbone.config._attn_implementation != "sdpa":  # mask functions of others know nothing of layouts
            return False
        if self.joins is None and self.backbone.training:
            self.joins = joining_agrees(self)
        # who measures may want the cache that is given back
        if not (self.backbone.training or self.trying):
            return False
        return bool(self.joins) and joint.can_join(named)

    def _reentrant(self) -> bool:
        if not self.backbone.training:
            return False
        return next(reentrant_layers(self.layers), None) is not None

    def _bridged(self, pairs: list[tuple[Tensor, Tensor]], named: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
        leaves, cross = bridge([t for pair in pairs for t in pair])
        if named.get("inputs_embeds") is not None:
            named["inputs_embeds"] = cross(named["inputs_embeds"])
        elif (given := named.get("encoder_outputs")) is not None:  # the decoder alone runs
            named["encoder_outputs"] = _with_states(given, cross(given[0]))
        else:
            self.crossing = cross  # taken up by the word embeddings, so that input_ids stay input_ids
        return [(leaves[i], leaves[i + 1]) for i in range(0, len(leaves), 2)]

    def _after_words(self, module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
        cross, self.crossing = self.crossing, None
        return None if cross is None else cross(output)

    def _shifted_positions(self, named: dict[str, Any], around: dict[str, Any]) -> Tensor:
        own = positions.settled(named, around, self.table)
        return positions.moved(own, self.num_virtual_tokens, self.table) if self.shift else own


def _apart(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor to be kept: one that is still a view of a parameter breaks where that is written in place."""
    return tensor.to(dtype).detach()


def _with_states(output: Any, states: Tensor) -> Any:
    """What an encoder gave, with other last states."""
    if isinstance(output, dict):
        return type(output)(**(dict(output) | {"last_hidden_state": states}))
    return (states, *output[1:])
