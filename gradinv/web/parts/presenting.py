"""The presenter's view: large, without controls, originals hidden until the reveal. It stands in the address."""

from __future__ import annotations

import streamlit as st

# Keys that press what the page shows at that moment: its own, since Streamlit keeps R for itself.
# And what copies the address, which only the browser knows as it is.
KEYS = """<script>
if (!window.gradinvKeys) {
  window.gradinvKeys = true;
  document.addEventListener('keydown', event => {
    const leave = document.querySelector('.gi-presenting') && '.st-key-present button';
    const what = {
      r: '.st-key-reveal button, .st-key-hide input', p: '.st-key-present button', Escape: leave,
    }[event.key];
    if (!what || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.target.closest('input:not([type=checkbox]), textarea, select, [contenteditable]')) return;
    const found = document.querySelector(what);
    if (found) { event.preventDefault(); event.stopImmediatePropagation(); found.click(); }
  }, true);
  document.addEventListener('click', async event => {
    if (!event.target.closest('.st-key-copy-link button')) return;
    const address = location.href;
    try {
      await navigator.clipboard.writeText(address);
    } catch {  // no secure connection, or not allowed in a frame
      const field = document.createElement('textarea');
      field.value = address;
      document.body.append(field);
      field.select();
      document.execCommand('copy');
      field.remove();
    }
    const told = document.createElement('div');
    told.className = 'gi-told';
    told.setAttribute('role', 'status');
    told.textContent = 'The link is copied';
    document.body.append(told);
    setTimeout(() => told.remove(), 2500);
  }, true);
}
</script>"""


def on() -> bool:
    """Whether the address asks for it."""
    return st.query_params.get("present") == "1"


def scripts() -> None:
    """What the keys need, and the mark by which the style knows that it is on."""
    st.html(KEYS, unsafe_allow_javascript=True)
    mark()


def mark() -> None:
    """Where it is on, what the style knows it by."""
    if on():
        st.html('<div class="gi-presenting"></div>')


def way_in() -> None:
    """The button that begins it."""
    st.button("Present (P)", icon=":material/present_to_all:", key="present", on_click=switch, args=(True,))


def way_out() -> None:
    """The button that ends it."""
    st.button("Leave the presentation (Esc)", type="tertiary", key="present", on_click=switch, args=(False,))


def switch(begin: bool) -> None:
    """Begin or end it; what was revealed is hidden again."""
    st.session_state.pop("revealed", None)
    if begin:
        st.query_params["present"] = "1"
    else:
        st.query_params.pop("present", None)
