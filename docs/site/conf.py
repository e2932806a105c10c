"""How `make docs` makes build/docs/site of the pages that tools/docs_site.py has put together."""

project = "spell_megatron"
extensions = ["myst_parser"]
# headings have the names that GitHub gives them, down to this level
myst_heading_anchors = 4
# an option keeps both of its dashes
smartquotes = False
# what stands in a block without a language is no Python
highlight_language = "text"

# Nothing on a page comes from elsewhere: it is read without a network.
html_theme = "furo"
html_title = "spell_megatron"
html_theme_options = {"top_of_page_buttons": []}
html_static_path = ["extra.css"]
html_css_files = ["extra.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
