"""``--model``: from PACKAGE.MODULE:FACTORY to a network."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

FACTORY_HELP = (
    "a network, as PACKAGE.MODULE:FACTORY or FILE.py:FACTORY, where FACTORY is a class or a function that makes a "
    "torch.nn.Module. Its arguments, if it needs any, are written as a call with literals: "
    "'monai.networks.nets:VNet(in_channels=1, out_channels=2)'"
)


class FactoryError(Exception):
    """No network came out of a factory; the message says why."""


@dataclass(frozen=True)
class Factory:
    """What makes a network.

    Attributes:
        text: as it was written.
        source: the name of a module, or the path of a file that ends in .py.
        attribute: the dotted name of the factory in it.
        arguments: for the factory.
        keywords: for the factory.
    """

    text: str
    source: str
    attribute: str
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]

    def make(self) -> torch.nn.Module:
        """Import the module and call the factory.

        Raises:
            FactoryError: if there is no such module or factory, if either raises, or if what is made is no module.
        """
        try:
            made: Any = _import(self.source)
            for name in self.attribute.split("."):
                made = getattr(made, name)
            if not isinstance(made, torch.nn.Module):
                made = made(*self.arguments, **self.keywords)
        except Exception as error:  # anything that the user's code raises
            raise FactoryError(f"cannot make {self.text}: {type(error).__name__}: {error}") from error
        if not isinstance(made, torch.nn.Module):
            raise FactoryError(f"{self.text} must make a torch.nn.Module, got {type(made).__name__}")
        return made


def parse_factory(text: str) -> Factory:
    """Read what `FACTORY_HELP` describes, without importing anything.

    Raises:
        ValueError: saying what is expected.
    """
    source, colon, expression = text.partition(":")
    expected = f"expected PACKAGE.MODULE:FACTORY or PACKAGE.MODULE:FACTORY(NAME=LITERAL, ...), got {text!r}"
    if not source or not colon:
        raise ValueError(expected)
    try:
        node = ast.parse(expression.strip(), mode="eval").body
    except SyntaxError:
        raise ValueError(expected) from None
    arguments: list[Any] = []
    keywords: dict[str, Any] = {}
    if isinstance(node, ast.Call):
        try:
            arguments = [ast.literal_eval(argument) for argument in node.args]
            keywords = {_keyword(keyword): ast.literal_eval(keyword.value) for keyword in node.keywords}
        except ValueError:
            raise ValueError(f"the arguments of a factory must be literals, got {text!r}") from None
        node = node.func
    attribute = ast.unparse(node)
    if not all(part.isidentifier() for part in attribute.split(".")):
        raise ValueError(expected)
    return Factory(text, source, attribute, tuple(arguments), keywords)


def _keyword(keyword: ast.keyword) -> str:
    if keyword.arg is None:  # **something
        raise ValueError
    return keyword.arg


def parse_input_size(text: str) -> tuple[int, ...]:
    """The numbers of 1x1x96x96x96.

    Raises:
        ValueError: if they are not numbers of at least 1, joined by x.
    """
    parts = text.split("x")
    if not all(part.isdecimal() and int(part) > 0 for part in parts):
        raise ValueError(f"expected numbers joined by x, such as 1x1x96x96x96, got {text!r}")
    return tuple(map(int, parts))


def _import(source: str) -> ModuleType:
    """The module of that name, or the file run as one; both find what lies beside them, as with ``python``."""
    path = Path(source)
    folder = os.path.abspath(path.parent) if source.endswith(".py") else os.getcwd()
    if folder not in sys.path:
        sys.path.insert(0, folder)
    if not source.endswith(".py"):
        return importlib.import_module(source)
    specification = importlib.util.spec_from_file_location(path.stem, path)
    if specification is None or specification.loader is None:
        raise ImportError(f"cannot import {source}")
    module = importlib.util.module_from_spec(specification)
    sys.modules[path.stem] = module  # as for an import: dataclasses and pickles look there
    specification.loader.exec_module(module)
    return module
