"""All sections of ``speed.py``, in the order in which they are measured and reported."""

from bench.section import Section
from bench.sections.first_image import FIRST_IMAGE
from bench.sections.memory import MEMORY
from bench.sections.pictures import FILES, IMAGE, LONG
from bench.sections.roofline import ROOFLINE
from bench.sections.sizes import SIZES
from bench.sections.steps import DEV, KLEIN, VAE

SECTIONS: dict[str, Section] = {
    section.name: section for section in (KLEIN, DEV, VAE, IMAGE, FILES, LONG, FIRST_IMAGE, SIZES, MEMORY, ROOFLINE)
}
