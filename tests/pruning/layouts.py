"""Where a twig may cut a base's layers, as Hypothesis draws it."""

from hypothesis import strategies as st


@st.composite
def layouts(draw, late=0):
    """Draw (layers, K, K_f, visual tokens), with at least `late` layers after K_f."""
    layers = draw(st.integers(1 + late, 60))
    trunk = draw(st.integers(0, layers - 1 - late))
    final_wipe = draw(st.integers(trunk + 1, layers - late))
    return layers, trunk, final_wipe, draw(st.integers(1, 3000))
