"""lmms-eval's view of an exported Symbiotic model: pictures and text in, text out.

    lmms-eval --model symbiotic --model_args pretrained=exported,trust_remote_code=True --tasks ocrbench

Needs transformers and lmms-eval only; the folder brings the model's code.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from lmms_eval.api.instance import Instance
from lmms_eval.api.model import lmms
from lmms_eval.api.registry import register_model
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

PLACEHOLDER = "<image>"
DEFAULT_MAX_NEW_TOKENS = 128


@register_model("symbiotic")
class Symbiotic(lmms):
    """A full export behind lmms-eval's interface of "simple" models.

    Args:
        pretrained: the exported folder; its image codec must be inside.
        trust_remote_code: must be true, since the folder brings its modeling code.
        device: as torch names it; None takes the GPU if there is one.
        device_map: as in transformers, to spread a model over GPUs; then ``device`` is not used.
        dtype: "auto" (as stored), "float32" or "bfloat16".
        batch_size: requests at once.
        image_size: "ROWSxCOLUMNS" of codes that every picture is resized to; None takes for each picture the
            resolution of the model's with the nearest shape.
        max_batch_size: part of lmms-eval's calls, not used.

    Raises:
        ValueError: an argument that isn't known, or a folder that can't do this.
    """

    def __init__(
        self,
        pretrained: str,
        trust_remote_code: bool = False,
        device: str | None = None,
        device_map: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        image_size: str | None = None,
        max_batch_size: int | None = None,
        **unknown: Any,
    ) -> None:
        super().__init__()
        if unknown:
            raise ValueError(f"the model class symbiotic has no arguments {', '.join(sorted(unknown))}")
        if trust_remote_code is not True:
            raise ValueError(f"{pretrained} brings its own modeling code; read it and add trust_remote_code=True")
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: give a number of at least 1")
        if dtype not in ("auto", "float32", "bfloat16", "float16"):
            raise ValueError(f"dtype={dtype}: give auto, float32, bfloat16 or float16")
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("the model class symbiotic runs in one process; device_map=auto spreads it over GPUs")
        self.batch_size = int(batch_size)
        self.processor = AutoProcessor.from_pretrained(pretrained, trust_remote_code=True)
        settings: dict[str, Any] = {"dtype": dtype if dtype == "auto" else getattr(torch, dtype)}
        if device_map is not None:
            settings["device_map"] = device_map
        model = AutoModelForCausalLM.from_pretrained(pretrained, trust_remote_code=True, **settings)
        if device_map is None:
            model = model.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.model = model.eval()
        table = getattr(self.model.config, "image_vocabulary", None)
        if table is None:
            raise ValueError(f"{pretrained} reads no images: config.json has no image_vocabulary")
        self.codec = self.processor.codec
        self.sizes = [(rows, columns) for _, rows, columns in table["resolutions"]]
        self.begin_generation = table["begin_generation_image"]
        if image_size is not None:
            wanted = tuple(int(side) for side in image_size.split("x"))
            if wanted not in self.sizes:
                known = ", ".join(f"{rows}x{columns}" for rows, columns in self.sizes)
                raise ValueError(f"image_size={image_size}: the model reads {known}")
            self.sizes = [wanted]

    def picture(self, visual: Image.Image | str) -> Image.Image:
        """A picture, or the file of one, at the size of the model's resolution whose shape is nearest to its own."""
        if isinstance(visual, str):
            visual = Image.open(visual)
        if not isinstance(visual, Image.Image):
            raise ValueError(f"the model class symbiotic takes pictures, not {type(visual).__name__}")
        shape = math.log(visual.height / visual.width)
        rows, columns = min(self.sizes, key=lambda size: (abs(math.log(size[0] / size[1]) - shape), -size[0] * size[1]))
        mode = "L" if self.codec.channels == 1 else "RGB"
        size = (columns * self.codec.stride, rows * self.codec.stride)
        return visual.convert(mode).resize(size, Image.Resampling.LANCZOS)

    def document(self, context: str, visuals: Sequence[Any]) -> list[Any]:
        """Segments for the processor: each picture at its ``<image>`` in the text, or all before the text."""
        images = [{"type": "image", "use": "understand", "image": self.picture(visual)} for visual in visuals]
        parts = context.split(PLACEHOLDER)
        if not (context or images):
            raise ValueError("a request has neither text nor a picture, so there is nothing to go on from")
        if len(parts) != len(images) + 1:
            return [*images, context] if context else images
        segments: list[Any] = []
        for index, part in enumerate(parts):
            segments += [part] if part else []
            segments += images[index : index + 1]
        return segments

    def _visuals(self, doc_to_visual: Any, task: str, split: str, doc_id: int) -> list[Any]:
        visuals = doc_to_visual(self.task_dict[task][split][doc_id]) if doc_to_visual else None
        return list(visuals or [])

    @torch.inference_mode()
    def generate_until(self, requests: list[Instance]) -> list[str]:
        """The answer to each request: text up to its stop strings, the end of the document or max_new_tokens."""
        answers = [""] * len(requests)
        groups: dict[str, list[int]] = defaultdict(list)
        for index, request in enumerate(requests):
            groups[json.dumps(request.args[1], sort_keys=True)].append(index)
        for key, indices in groups.items():
            settings = json.loads(key)
            for start in range(0, len(indices), self.batch_size):
                batch = indices[start : start + self.batch_size]
                texts = self._generate([requests[index].args for index in batch], settings)
                for index, text in zip(batch, texts, strict=True):
                    answers[index] = text
                    self.cache_hook.add_partial("generate_until", (requests[index].args[0], settings), text)
        return answers

    def _generate(self, batch: Sequence[tuple], settings: dict[str, Any]) -> list[str]:
        documents = [
            self.document(context, self._visuals(doc_to_visual, task, split, doc_id))
            for context, _, doc_to_visual, doc_id, task, split in batch
        ]
        inputs = self.processor(documents).to(self.model.device)
        rows = self.model.generate(
            **inputs,
            max_new_tokens=settings.get("max_new_tokens", DEFAULT_MAX_NEW_TOKENS),
            num_beams=settings.get("num_beams") or 1,
            # An answer is text: drawing a picture would use up its tokens.
            suppress_tokens=[self.begin_generation],
            **self._sampling(settings),
        )
        answers = [self.processor.decode(row) for row in rows[:, inputs["input_ids"].shape[1] :].cpu()]
        until = settings.get("until") or []
        for stop in [until] if isinstance(until, str) else until:
            answers = [answer.partition(stop)[0] if stop else answer for answer in answers]
        return answers

    @staticmethod
    def _sampling(settings: dict[str, Any]) -> dict[str, Any]:
        """Greedy unless the task asks for a temperature."""
        temperature = settings.get("temperature") or 0
        if temperature <= 0 or settings.get("do_sample") is False:
            return {"do_sample": False}
        return {"do_sample": True, "temperature": temperature, "top_p": settings.get("top_p") or 1.0, "top_k": 0}

    @torch.inference_mode()
    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        """Mean negative log-likelihood of each continuation, and whether it is the greedy one.

        The negative: lmms-eval's tasks with choices take the one with the least value, unlike lm-eval's.
        """
        results = []
        for request in requests:
            context, continuation, doc_to_visual, doc_id, task, split = request.args
            if not isinstance(continuation, str):
                continuation = continuation(self.task_dict[task][split][doc_id])
            # As lm-evaluation-harness does it: spaces go to the continuation, whose tokens are those behind the
            # context's in the tokens of both together.
            text = context.rstrip()
            continuation = context[len(text) :] + continuation
            prompt = self.document(text, self._visuals(doc_to_visual, task, split, doc_id))
            start = self.processor([prompt])["input_ids"].shape[1]
            joined = isinstance(prompt[-1], str)
            whole = [*prompt[:-1], prompt[-1] + continuation] if joined else [*prompt, continuation]
            inputs = self.processor([whole]).to(self.model.device)
            logits = self.model(**inputs, use_cache=False).logits[0, start - 1 : -1].float()
            labels = inputs["input_ids"][0, start:].to(logits.device)
            scores = torch.log_softmax(logits, dim=-1).gather(1, labels.unsqueeze(1))
            results.append((-float(scores.mean()), bool((logits.argmax(dim=-1) == labels).all())))
        return results

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Conversations of several rounds: not supported, the model is trained on documents."""
        raise NotImplementedError("the model class symbiotic answers one question at a time")
