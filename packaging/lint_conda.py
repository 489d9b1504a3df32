"""Parses and renders packaging/conda/recipe.yaml by rattler-build's own library (`pip install py-rattler-build`)."""

from __future__ import annotations

from pathlib import Path

from rattler_build import Stage0Recipe, VariantConfig

recipe = Stage0Recipe.from_yaml(Path(__file__).with_name("conda").joinpath("recipe.yaml").read_text())
variants = {
    "c_compiler": ["gcc"],
    "c_stdlib": ["sysroot"],
    "c_stdlib_version": ["2.17"],
    "python": ["3.12.* *_cpython"],
}
for rendered in recipe.render(VariantConfig(variants)):
    print(rendered.recipe.package.name, rendered.recipe.package.version, rendered.recipe.build.string)
    print(rendered.recipe.requirements.to_dict())
