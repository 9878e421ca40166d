"""The built-in chat template: MiniMax-M2's conversation format in our own words. Only data."""

# Renders what M2's own template renders. One thing more: with `keep_reasoning` true, the reasoning of every assistant
# message is rendered, where M2's format keeps only what came after the last user message.
SOURCE = r"""
{%- macro turn(name) %}{{ ']~b]' ~ name }}{% endmacro %}
{%- set end = '[e~[\n' %}
{%- set call_open, call_close = '<minimax:tool_call>', '</minimax:tool_call>' %}

{%- macro manual(tools) %}
    {{- '\n\n# Tools\nYou may call one or more tools to assist with the user query.\n' }}
    {{- 'Here are the tools available in JSONSchema format:\n\n<tools>\n' }}
    {%- for tool in tools %}
        {{- '<tool>' ~ (tool.function | tojson) ~ '</tool>\n' }}
    {%- endfor %}
    {{- '</tools>\n\nWhen making tool calls, use XML format to invoke tools and pass parameters:\n\n' }}
    {{- call_open ~ '\n<invoke name="tool-name-1">\n' }}
    {%- for n in (1, 2) %}
        {{- '<parameter name="param-key-' ~ n ~ '">param-value-' ~ n ~ '</parameter>\n' }}
    {%- endfor %}
    {{- '...\n</invoke>\n' ~ call_close }}
{%- endmacro %}

{%- macro calls(tool_calls) %}
    {{- '\n' ~ call_open ~ '\n' }}
    {%- for call in tool_calls %}
        {{- '<invoke name="' ~ call.function.name ~ '">\n' }}
        {%- for name, value in call.function.arguments.items() %}
            {{- '<parameter name="' ~ name ~ '">' ~ (value if value is string else value | tojson) ~ '</parameter>\n' }}
        {%- endfor %}
        {{- '</invoke>\n' }}
    {%- endfor %}
    {{- call_close }}
{%- endmacro %}

{%- macro results(content) %}
    {%- if content is string %}
        {{- '\n<response>' ~ content ~ '</response>' }}
    {%- else %}
        {%- for part in content %}
            {{- '\n<response>' ~ part.text ~ '\n</response>' }}
        {%- endfor %}
    {%- endif %}
{%- endmacro %}

{%- set last = namespace(question=-1) %}
{%- for message in messages if message.role == 'user' %}
    {%- set last.question = last.question + 1 %}
{%- endfor %}
{%- set seen = namespace(questions=-1) %}

{{- ']~!b[' ~ turn('system') ~ '\n' }}
{%- set system = messages[0] if messages and messages[0].role == 'system' else {} %}
{{- system.content or model_identity or 'You are a helpful assistant.' }}
{%- for key, label in [('current_date', 'Current date: '), ('current_location', 'Current location: ')] %}
    {{- '\n' ~ label ~ system[key] if system[key] else '' }}
{%- endfor %}
{{- manual(tools) if tools else '' }}
{{- end }}

{%- for message in messages %}
    {%- if message.role == 'user' %}
        {%- set seen.questions = seen.questions + 1 %}
        {{- turn('user') ~ '\n' ~ message.content ~ end }}
    {%- elif message.role == 'assistant' %}
        {{- turn('ai') ~ '\n' }}
        {%- if message.reasoning_content and (keep_reasoning or seen.questions == last.question) %}
            {{- '<think>\n' ~ message.reasoning_content ~ '\n</think>\n\n' }}
        {%- endif %}
        {{- message.content }}
        {{- calls(message.tool_calls) if message.tool_calls else '' }}
        {{- end }}
    {%- elif message.role == 'tool' %}
        {{- turn('tool') if loop.first or loop.previtem.role != 'tool' else '' }}
        {{- results(message.content) }}
        {{- end if loop.last or loop.nextitem.role != 'tool' else '' }}
    {%- endif %}
{%- endfor %}

{{- turn('ai') ~ '\n<think>\n' if add_generation_prompt else '' }}
"""
