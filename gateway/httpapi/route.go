package httpapi

import (
	"net/http"
	"reflect"

	"holdfast/bridge/wire"
	"holdfast/devices"
)

// route is a row of the table: what may be asked, who may ask it, and what the API's description says of it.
type route struct {
	method, path string
	who          Role   // the least role; 0: everybody, and nothing of it tells more than that a gateway is here
	loopback     bool   // this machine needs no token for it
	id           string // of the operation
	summary      string
	query        []param
	body         reflect.Type // nil: none
	optional     bool         // the body may be left out
	cbor         bool         // the body may be CBOR, too
	form         bool         // the body is a form
	passing      bool         // what it changes is not stored
	limit        int64        // of the body, bytes; 0: maxBody
	stream       bool         // it ends when somebody ends it
	resumes      bool         // a stream that goes on where it ended
	reads        bool         // it changes nothing, whatever its method is
	bulk         bool         // its answer may be large: how long it takes says nothing
	answers      []answer
	fails        []string // codes, besides those that follow from who, query and body
	h            handler
}

func (r *route) name() string { return r.method + " " + r.path }

// changes tells whether it changes something.
func (r *route) changes() bool { return r.method != http.MethodGet && !r.reads }

func (r *route) maxBody() int64 {
	if r.limit > 0 {
		return r.limit
	}
	return maxBody
}

// failures lists every code that the row may answer.
func (r *route) failures() []string {
	var codes []string
	if r.who > 0 {
		codes = append(codes, codeUnauthorized, codeTooManyAttempts)
	}
	if r.loopback {
		codes = append(codes, codeHost)
	}
	if r.who > Viewer {
		codes = append(codes, codeForbidden)
	}
	codes = append(codes, codeBadQuery)
	if r.body != nil {
		codes = append(codes, codeBadBody, codeMediaType, codeBodyTooLarge)
	}
	if r.changes() && r.who > 0 {
		codes = append(codes, codeCSRF)
	}
	if r.changes() && !r.passing {
		codes = append(codes, devices.CodeUnavailable)
	}
	if r.changes() || r.bulk {
		codes = append(codes, codeAudit)
	}
	if r.who > 0 || len(r.fails) > 0 {
		codes = append(codes, codeInternal)
	}
	return append(codes, r.fails...)
}

// answer is how a row answers if it does what was asked.
type answer struct {
	status int
	text   string
	body   reflect.Type // nil: none
	mime   string       // "": JSON
}

// param is a parameter of the query.
type param struct {
	name, text string
	schema     map[string]any
	max        int // bytes; 0: no limit but that of the whole
}

func text(name, what string) param {
	return param{name: name, text: what, schema: map[string]any{"type": "string", "maxLength": 256}, max: 256}
}

func oneOf(name, what string, values ...string) param {
	return param{name: name, text: what, schema: map[string]any{"type": "string", "enum": values}}
}

var (
	limitParam = param{name: "limit", text: "How many at most.", schema: map[string]any{
		"type": "integer", "minimum": 1, "maximum": maxLimit, "default": defaultLimit,
	}}
	waitParam = text("wait", "Answer only when the command has ended, or after this time, such as 30s; 60s at most.")
	before    = text("before", "Only those submitted before this; take it from next of the page before.")
	states    = text("state", "Only commands in one of these states, separated by commas: QUEUED,SENT.")
)

// is names the type of a body in the table.
func is[T any]() reflect.Type { return reflect.TypeFor[T]() }

// table is the API.
var table = []route{
	{
		method: "GET", path: "/healthz", id: "get_health", summary: "Is the process alive?",
		answers: []answer{{200, "It is.", is[Health](), ""}}, h: (*Server).health,
	},
	{
		method: "GET", path: "/readyz", id: "get_ready", summary: "Is the spool open, and does every listener accept?",
		answers: []answer{{200, "Yes.", is[Health](), ""}}, fails: []string{codeNotReady}, h: (*Server).ready,
	},
	{
		method: "GET", path: "/metrics", who: Viewer, loopback: true, id: "get_metrics",
		summary: "Metrics in the text format of Prometheus. From the gateway itself without a token.",
		answers: []answer{{200, "The metrics.", is[string](), "text/plain"}}, h: (*Server).showMetrics,
	},
	{
		method: "POST", path: "/signin", id: "sign_in", passing: true,
		summary: "Begin a session of a browser, for a token: it gets the cookie holdfast_session. A browser, which accepts text/html, is sent on to next, or back to the form with ?error=.",
		body:    is[SignIn](), form: true,
		answers: []answer{{200, "The session has begun.", is[SignedIn](), ""}, {303, "Where to go on.", nil, ""}},
		fails:   []string{codeUnauthorized, codeTooManyAttempts, codeCSRF}, h: (*Server).signIn,
	},
	{
		method: "POST", path: "/signout", id: "sign_out", passing: true,
		summary: "End the session that the cookie names. The header X-Holdfast-CSRF or the field csrf has its token.",
		body:    is[SignOut](), form: true, optional: true,
		answers: []answer{{204, "It has ended.", nil, ""}, {303, "Where to go on.", nil, ""}},
		fails:   []string{codeCSRF}, h: (*Server).signOut,
	},
	{
		method: "GET", path: "/api/v1/openapi.json", who: Viewer, id: "get_openapi", summary: "This description.",
		answers: []answer{{200, "OpenAPI 3.1.", is[map[string]any](), ""}, {304, "It is what If-None-Match names.", nil, ""}}, h: (*Server).openAPI,
	},
	{
		method: "GET", path: "/api/v1/status", who: Viewer, id: "get_status", summary: "One look at the whole gateway.",
		answers: []answer{{200, "How it is now.", is[Status](), ""}}, h: (*Server).status,
	},
	{
		method: "GET", path: "/api/v1/alarms", who: Viewer, id: "list_alarms", summary: "What a person should look at now, the critical ones first.",
		answers: []answer{{200, "All of them.", is[AlarmList](), ""}}, h: (*Server).listAlarms,
	},
	{
		method: "GET", path: "/api/v1/history", who: Viewer, id: "get_history",
		summary: "Messages a second and the time that acknowledgements took, over the last hour, a restart included.",
		query:   []param{text("since", "Only points after this time.")},
		answers: []answer{{200, "The points.", is[History](), ""}}, h: (*Server).history,
	},
	{
		method: "GET", path: "/api/v1/devices", who: Viewer, id: "list_devices", summary: "Devices, by id.",
		query: []param{
			text("search", "Only those with this in id, name or a label's value, in small or capital letters."),
			text("role", "Only those with this role."),
			oneOf("connected", "Only those that are connected, or that are not.", "true", "false"),
			oneOf("enabled", "Only those that are enabled, or that are not.", "true", "false"),
			text("label", "Only those with this label: key, or key=value."),
			text("after", "Only ids after this one; take it from next of the page before."),
			limitParam,
		},
		answers: []answer{{200, "A page of them.", is[DevicePage](), ""}}, h: (*Server).listDevices,
	},
	{
		method: "POST", path: "/api/v1/devices", who: Admin, id: "add_device", summary: "Register a device.",
		body: is[NewDevice](), answers: []answer{{201, "It is registered. secret is shown this once.", is[DeviceMade](), ""}},
		fails: []string{codeInvalidDevice, codeDeviceExists, codeTooManyDevices}, h: (*Server).addDevice,
	},
	{
		method: "GET", path: "/api/v1/devices/{id}", who: Viewer, id: "get_device", summary: "One device.",
		answers: []answer{{200, "The device.", is[devices.Device](), ""}}, fails: []string{codeInvalidDevice, devices.CodeUnknownDevice}, h: (*Server).getDevice,
	},
	{
		method: "PATCH", path: "/api/v1/devices/{id}", who: Operator, id: "change_device",
		summary: "Change a device. An operator may change enabled; the rest needs an admin. Disabling it ends its connection.",
		body:    is[DevicePatch](), answers: []answer{{200, "The device, changed.", is[devices.Device](), ""}},
		fails: []string{codeInvalidDevice, devices.CodeUnknownDevice}, h: (*Server).changeDevice,
	},
	{
		method: "DELETE", path: "/api/v1/devices/{id}", who: Admin, id: "remove_device",
		summary: "Forget a device, end its connection, and cancel its commands.",
		answers: []answer{{204, "It is gone.", nil, ""}}, fails: []string{codeInvalidDevice, devices.CodeUnknownDevice}, h: (*Server).removeDevice,
	},
	{
		method: "POST", path: "/api/v1/devices/{id}/credentials", who: Admin, id: "add_credential",
		summary: "Give a device another credential, and let its others run out if so asked.",
		body:    is[NewCredential](), answers: []answer{{201, "It is valid. secret is shown this once.", is[CredentialMade](), ""}},
		fails: []string{codeInvalidDevice, devices.CodeUnknownDevice}, h: (*Server).addCredential,
	},
	{
		method: "DELETE", path: "/api/v1/devices/{id}/credentials/{credential}", who: Admin, id: "remove_credential",
		summary: "Revoke a credential. Who is connected with it is disconnected.",
		answers: []answer{{204, "It is gone.", nil, ""}}, fails: []string{codeInvalidDevice, devices.CodeUnknownDevice, codeNoCredential},
		h: (*Server).removeCredential,
	},
	{
		method: "GET", path: "/api/v1/devices/{id}/commands", who: Viewer, id: "list_device_commands", summary: "Commands of one device, the newest first.",
		query: []param{states, before, limitParam}, answers: []answer{{200, "A page of them, without payloads and results.", is[CommandPage](), ""}},
		fails: []string{codeInvalidDevice, devices.CodeUnknownDevice}, h: (*Server).listDeviceCommands,
	},
	{
		method: "POST", path: "/api/v1/devices/{id}/commands", who: Operator, id: "send_command",
		summary: "Send a command. It is on disk when this answers. The same id and body again are the same command; the header Idempotency-Key is the id if the body has none.",
		query:   []param{waitParam}, body: is[wire.Submit](), cbor: true, limit: wire.MaxSubmit,
		answers: []answer{
			{201, "It is taken. Location says where it is.", is[Command](), ""},
			{200, "It was taken before: this is how it is now.", is[Command](), ""},
		},
		fails: []string{
			devices.CodeUnknownDevice, devices.CodeDisabled, devices.CodeInvalid, devices.CodeTooLarge, devices.CodeQueueFull, devices.CodeExpired, devices.CodeConflict,
		}, h: (*Server).sendCommand,
	},
	{
		method: "GET", path: "/api/v1/commands", who: Viewer, id: "list_commands", summary: "Commands of all devices, the newest first.",
		query:   []param{text("device", "Only those of this device."), states, before, limitParam},
		answers: []answer{{200, "A page of them, without payloads and results.", is[CommandPage](), ""}}, h: (*Server).listCommands,
	},
	{
		method: "GET", path: "/api/v1/commands/{id}", who: Viewer, id: "get_command", summary: "One command with payload, result and history.",
		query: []param{waitParam}, answers: []answer{{200, "The command.", is[Command](), ""}}, fails: []string{devices.CodeUnknown}, h: (*Server).getCommand,
	},
	{
		method: "DELETE", path: "/api/v1/commands/{id}", who: Operator, id: "cancel_command",
		summary: "Cancel a command: for sure while it is QUEUED, else as far as the device has not finished.",
		query:   []param{text("reason", "Why; or say it in the body.")}, body: is[CancelRequest](), optional: true,
		answers: []answer{{200, "The command as it is now.", is[Command](), ""}},
		fails:   []string{devices.CodeUnknown, devices.CodeEnded, devices.CodeInvalid}, h: (*Server).cancelCommand,
	},
	{
		method: "GET", path: "/api/v1/lanes", who: Viewer, id: "list_lanes", summary: "The lanes of the spool.",
		answers: []answer{{200, "All of them.", is[LaneList](), ""}}, h: (*Server).listLanes,
	},
	{
		method: "GET", path: "/api/v1/lanes/{lane}/messages", who: Viewer, id: "list_messages",
		summary: "Look at messages that wait in a lane, the oldest first. It takes nothing out.",
		query:   []param{text("after", "Only those after this sequence number; take it from next of the page before."), limitParam},
		answers: []answer{{200, "A page of them, payloads no longer than 4 KiB.", is[MessagePage](), ""}}, fails: []string{codeNoLane}, h: (*Server).listMessages,
	},
	{
		method: "GET", path: "/api/v1/messages/live", who: Viewer, id: "watch_messages", stream: true,
		summary: "What devices publish, as it is stored: server-sent events of kind message, whose data is a LiveMessage in JSON. If more comes than the stream takes, some are missed, and missed says how many. It takes nothing out.",
		query:   []param{text("filter", "Only topics that this MQTT filter matches, such as dt/+/alarm; default: #.")},
		answers: []answer{{200, "The stream.", is[LiveMessage](), "text/event-stream"}}, fails: []string{codeTooManyStreams}, h: (*Server).watchMessages,
	},
	{
		method: "POST", path: "/api/v1/lanes/{lane}/purge", who: Operator, id: "purge_lane",
		summary: "Drop messages of a lane, the oldest first, until the first that is to stay. They count as evicted, and upstreams are told (gap, reason purged). The space is free at once.",
		body:    is[PurgeRequest](), answers: []answer{{200, "What is gone.", is[Purged](), ""}}, fails: []string{codeNoLane}, h: (*Server).purge,
	},
	{
		method: "GET", path: "/api/v1/parked", who: Viewer, id: "list_parked",
		summary: "Look at messages that an upstream refused for good, by lane and sequence. It takes nothing out.",
		query: []param{
			text("lane", "Only those of this lane."), text("upstream", "Only those that this upstream refused."),
			text("after", "Only those after this one; take it from next of the page before."), limitParam,
		},
		answers: []answer{{200, "A page of them, payloads no longer than 4 KiB.", is[ParkedPage](), ""}}, fails: []string{codeNoLane}, h: (*Server).listParked,
	},
	{
		method: "POST", path: "/api/v1/parked/replay", who: Operator, id: "replay_parked",
		summary: "Send parked messages again: each goes back into its lane as a new message for the upstream that refused it. It is on disk when this answers.",
		body:    is[ReplayRequest](), answers: []answer{{200, "They wait for the upstream. Those that are not parked were passed over.", is[Replayed](), ""}},
		fails: []string{codeNoLane, codeNoUpstream, codeLaneFull}, h: (*Server).replayParked,
	},
	{
		method: "GET", path: "/api/v1/lanes/{lane}/export", who: Operator, id: "export_lane", bulk: true,
		summary: "All messages that wait in a lane, or that are parked, with whole payloads: a line of JSON each, the oldest first. It takes nothing out. The last line is {\"end\": ExportEnd}: without it something is missing.",
		query: []param{
			text("from", "The first sequence number."), text("to", "The last one."), text("since", "Only what was received, or parked, at this time or later."),
			text("device", "Only messages of this device."), oneOf("parked", "Those that an upstream refused for good, instead of those that wait.", "true", "false"),
			oneOf("progress", "Tell with lines {\"at\": N} how far it is where nothing is to be sent.", "true", "false"),
			text("bytes_per_second", "No faster than that; default: 32 MiB."),
		},
		answers: []answer{{200, "The lines.", is[ExportedMessage](), "application/x-ndjson"}}, fails: []string{codeNoLane, codeTooManyStreams}, h: (*Server).exportLane,
	},
	{
		method: "GET", path: "/api/v1/upstreams", who: Viewer, id: "list_upstreams", summary: "The links to the cloud.",
		answers: []answer{{200, "All of them.", is[UpstreamList](), ""}}, h: (*Server).listUpstreams,
	},
	{
		method: "GET", path: "/api/v1/events", who: Viewer, id: "watch_events", stream: true, resumes: true,
		summary: "What happens, as it happens: server-sent events, whose data is an Event in JSON. The header Last-Event-ID goes on where a stream ended; an event reset says that some are missed.",
		query: []param{
			text("kinds", "Only these kinds, separated by commas: command, device, upstream, refusal, alarm."),
			text("device", "Only what is about this device."),
			text("command", "Only what is about this command."),
			text("last_event_id", "As the header Last-Event-ID, for those that cannot send it."),
		},
		answers: []answer{{200, "The stream.", is[Event](), "text/event-stream"}}, fails: []string{codeTooManyStreams}, h: (*Server).events,
	},
	{
		method: "POST", path: "/api/v1/backup", who: Admin, id: "make_backup", bulk: true,
		summary: "Back up all that is stored, while the gateway works: a tar archive with backup.json and the folder store, which together are a data folder.",
		body:    is[NewBackup](), optional: true,
		answers: []answer{
			{200, "The archive. backup.json is its first file and lists the others: what ends before the last of them is not whole.", is[string](), "application/x-tar"},
			{201, "With keep: it is there.", is[BackupKept](), ""},
		},
		fails: []string{codeBackupRuns}, h: (*Server).backup,
	},
	{
		method: "POST", path: "/api/v1/reload", who: Admin, id: "reload",
		summary: "Read the configuration file again and take what may change while the gateway runs, all of it or, if something is wrong, nothing. What needs a restart is named.",
		answers: []answer{{200, "It is taken.", is[Reload](), ""}}, fails: []string{codeConfig}, h: (*Server).reload,
	},
	{
		method: "GET", path: "/api/v1/config/diff", who: Admin, id: "diff_file", summary: "What a reload would do now. Nothing is changed.",
		answers: []answer{{200, "What it would change.", is[Reload](), ""}}, fails: []string{codeConfig}, h: (*Server).diffFile,
	},
	{
		method: "POST", path: "/api/v1/config/diff", who: Admin, id: "diff_config", reads: true, limit: 2 << 20,
		summary: "What a reload would do with this file. Nothing is changed, and the files that it names are not looked at.",
		body:    is[ConfigFile](), answers: []answer{{200, "What it would change.", is[Reload](), ""}}, fails: []string{codeConfig}, h: (*Server).diffConfig,
	},
	{
		method: "GET", path: "/api/v1/log", who: Viewer, id: "get_log", summary: "How much is logged.",
		answers: []answer{{200, "The level.", is[LogLevel](), ""}}, h: (*Server).getLog,
	},
	{
		method: "PUT", path: "/api/v1/log", who: Admin, id: "set_log",
		summary: "Log more, or less, until the next reload or restart takes the file's log.level.",
		body:    is[LogLevel](), answers: []answer{{200, "The level.", is[LogLevel](), ""}}, h: (*Server).setLog,
	},
	{
		method: "GET", path: "/api/v1/devices/{id}/debug", who: Viewer, id: "get_debug", summary: "Is everything about this device logged, and how long?",
		answers: []answer{{200, "How it is.", is[DeviceDebug](), ""}}, fails: []string{codeInvalidDevice}, h: (*Server).getDebug,
	},
	{
		method: "PUT", path: "/api/v1/devices/{id}/debug", who: Operator, id: "debug_device",
		summary: "Log everything about a device for some time, whatever the level: its packets, without payloads, and what is decided about it. It ends by itself. The device need not be registered.",
		body:    is[DebugRequest](), answers: []answer{{200, "How it is.", is[DeviceDebug](), ""}}, fails: []string{codeInvalidDevice, codeDebug}, h: (*Server).debugDevice,
	},
	{
		method: "GET", path: "/api/v1/audit", who: Admin, id: "list_audit",
		summary: "Who did what: each act that changed something or handed data out, the newest first. head is the last record: note it elsewhere, and holdfast audit verify tells later whether the log still holds it.",
		query: []param{
			text("who", "Only what this token did, or whoever else stands under who."), text("act", "Only this act."),
			text("object", "Only acts on objects that begin with this."), text("since", "Only what was done at this time or later."),
			text("before", "Only records before this one; take it from next of the page before."), limitParam,
		},
		answers: []answer{{200, "A page of them.", is[AuditPage](), ""}}, h: (*Server).listAudit,
	},
	{
		method: "GET", path: "/api/v1/tokens", who: Admin, id: "list_tokens", summary: "Who may use this API, by name.",
		answers: []answer{{200, "All of them, without their secrets.", is[TokenList](), ""}}, h: (*Server).listTokens,
	},
	{
		method: "POST", path: "/api/v1/tokens", who: Admin, id: "add_token", summary: "Let somebody use this API.",
		body: is[NewToken](), answers: []answer{{201, "It is valid. secret is shown this once.", is[TokenMade](), ""}},
		fails: []string{codeInvalidToken, codeTokenExists, codeTooManyTokens}, h: (*Server).addToken,
	},
	{
		method: "DELETE", path: "/api/v1/tokens/{name}", who: Admin, id: "remove_token", summary: "Revoke a token, at once.",
		answers: []answer{{204, "It is gone.", nil, ""}}, fails: []string{codeNoToken}, h: (*Server).removeToken,
	},
}
