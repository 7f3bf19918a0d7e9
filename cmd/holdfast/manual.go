package main

// What "holdfast help" and the manual pages say besides what a command says of itself.

const overview = `Holdfast is an IoT edge gateway: it takes what devices publish over MQTT, acknowledges
it once it is on disk, and sends it upstream until the upstream has it.`

// example is a line to type, and what it does.
type example struct{ line, does string }

var firstSteps = []example{
	{"holdfast demo", "devices, a cut uplink, a killed gateway, and the ledger at the end"},
	{"holdfast run", "a gateway for this machine only, in ./holdfast-data"},
	{"holdfast config print > gw.yaml", "its configuration, to start from"},
}

// fact is something outside of the command line that commands heed.
type fact struct {
	name, text string
	of         string // the flag that commands have which it is for, or the first word of their names; "": all
}

var exitCodes = []fact{
	{"0", "done", ""},
	{"1", "failed", ""},
	{"2", "wrong usage or configuration", ""},
}

var environment = []fact{
	{tokenVariable, "the token of the HTTP API, unless --token-file is given", "--token-file"},
	{"GOGC", "how much memory may grow until it is cleaned up, in percent; without it what fits a small machine", "run"},
	{"GOMEMLIMIT", "how much memory the gateway tries to stay below; without it what fits this machine", "run"},
}

var files = []fact{
	{"/etc/holdfast/gateway.yaml", "the configuration that the systemd unit names", "--config"},
	{"/var/lib/holdfast", "the data directory, DATA_DIR, unless the configuration says another", "--config"},
	{"./holdfast-data", "the data directory of a gateway without a configuration", "--config"},
	{"DATA_DIR/admin.token", "a token of the HTTP API for its own machine, made at the first start", "--token-file"},
	{"DATA_DIR/audit.log", "who did what", "audit"},
}

// groups says what commands with the same first word are for.
var groups = map[string]string{
	"config":  "Check, show and compare configurations",
	"device":  "Register devices and say which may connect",
	"command": "Send commands to devices and follow them",
	"token":   "Say who may use the HTTP API",
	"cert":    "Make certificates for a site without an authority of its own",
	"cloud":   "Be the cloud's side: take what gateways send, send commands",
	"audit":   "See who did what to the gateway",
	"spool":   "See, check, copy and empty what a gateway has spooled",
}

// examples are lines to type, by the name of the command.
var examples = map[string][]example{
	"run":  {{"holdfast run --config /etc/holdfast/gateway.yaml", "as the systemd unit does"}},
	"demo": {{"holdfast demo --keep", "leave it running, and say where to connect"}},
	"verify": {
		{"holdfast verify --minutes 2", "the disk of the current folder, in short"},
		{"holdfast verify --config /etc/holdfast/gateway.yaml", "the disk of its data directory"},
	},
	"config check":   {{"holdfast config check gateway.yaml", "before it is taken"}},
	"config diff":    {{"holdfast config diff gateway.yaml", "what a reload with this file would change"}},
	"config print":   {{"holdfast config print > gateway.yaml", "a configuration to start from"}},
	"status":         {{"holdfast status --config /etc/holdfast/gateway.yaml", "the gateway with this configuration"}},
	"top":            {{"holdfast top --config /etc/holdfast/gateway.yaml", "over SSH, until q is pressed"}},
	"health":         {{"holdfast health --config /etc/holdfast/gateway.yaml", "as a container's health check does"}},
	"device add":     {{"holdfast device add pump-7 --name 'pump in cellar' --label floor=-1", "its token is shown once"}},
	"device list":    {{"holdfast device list --offline --label floor=-1", "those of a floor that are not there"}},
	"device rotate":  {{"holdfast device rotate pump-7 --overlap 7d", "a week for giving it the new token"}},
	"device import":  {{"holdfast device import pumps.csv --secrets pumps.tokens", "register all, their tokens into a file"}},
	"command send":   {{"holdfast command send pump-7 set --payload '{\"rpm\": 900}' --wait", "follow it to its end"}},
	"command list":   {{"holdfast command list --device pump-7 --state QUEUED,SENT", "what waits for a device"}},
	"command cancel": {{"holdfast command cancel 01JCXA --reason 'wrong pump'", "call one off, by its id"}},
	"token add":      {{"holdfast token add grafana --role viewer --lifetime 365d", "for a program that looks"}},
	"cert init":      {{"holdfast cert init --host gw.ward-3.example --host 192.0.2.7", "how devices reach the gateway"}},
	"cert device":    {{"holdfast cert device pump-7 --bundle pump-7.pem", "key and certificates in one file"}},
	"cert rotate":    {{"holdfast cert rotate server", "once a year"}},
	"cloud tail":     {{"holdfast cloud tail --url mqtts://broker.example.com:8883 --gateway ward-3-east", "what one gateway sends"}},
	"cloud send":     {{"holdfast cloud send --url mqtts://broker.example.com:8883 --gateway ward-3-east pump-7 stop --wait", "through the broker"}},
	"audit list":     {{"holdfast audit list --since 24h", "what was done today"}},
	"audit verify":   {{"holdfast audit verify", "before the log is believed"}},
	"backup": {
		{"holdfast backup /mnt/usb/ward-3-east.tar", "in one file, elsewhere"},
		{"holdfast backup - | ssh backup 'cat > ward-3-east.tar'", "to another machine"},
	},
	"spool peek":   {{"holdfast spool peek alarm --limit 5", "the five oldest alarms that wait"}},
	"spool export": {{"holdfast spool export --lane alarm --since 2h --output alarms.jsonl", "a copy of the alarms of two hours"}},
	"spool replay": {{"holdfast spool replay --all --upstream cloud", "after the cloud was mended"}},
	"spool purge":  {{"holdfast spool purge bulk --older-than 7d", "make space"}},
	"completion":   {{"source <(holdfast completion bash)", "for this shell"}},
}
