{{- define "affinity.labels" -}}
app.kubernetes.io/name: affinity
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end -}}

{{- /* Where probes ask: empty where the agent listens at all addresses, the node's among them. */ -}}
{{- define "affinity.probedHost" -}}
{{- $host := .Values.metricsAddress | trimPrefix "[" | trimSuffix "]" -}}
{{- if not (has $host (list "::" "0.0.0.0")) -}}
{{- $host -}}
{{- end -}}
{{- end -}}
