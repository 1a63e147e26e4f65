"""The nouns of the design as array types, and the one legend of dimension letters.

Video        b batch · t pixel frames · f latent frames · H W pixels · h w latent pixels · c channels
Tokens       n m tokens · l text tokens · d width · a heads · k width of a head · e text width
Schedules    s steps

One latent frame stands for four pixel frames, except the first, which stands for one: t = 4·f − 3.
"""

from jaxtyping import Array, Bool, Float, Int

Latents = Float[Array, "b f h w c"]
"""A clip in the space of the VAE, normalised to unit scale; float32."""

Levels = Float[Array, "b f"]
"""The noise level of each frame, 0 clean … 1 noise; float32. The only unit of time in this project."""

Schedule = Float[Array, "s f"]
"""Levels over the steps of the sampler: row 0 is where every frame starts, the last row is 0."""

Sigmas = Float[Array, "s"]
"""How one frame goes from noise to clean: starts at or just below 1, falls, ends at exactly 0."""

Strength = Float[Array, "f"]
"""How much of the path each frame takes part in: 1 generated, 0 kept bit for bit, between: kept loosely."""

Video = Float[Array, "b t H W 3"]
"""Pixels in −1 … 1."""

TextStates = Float[Array, "b l e"]
"""What the text encoder says of a prompt; rows after its true length are 0."""

Tokens = Int[Array, "b l"]
Mask = Bool[Array, "b l"]
