// Package cloud is the cloud's side of a gateway: Receiver turns what arrives from any number of
// gateways, in any format, into messages, each once, and says what is missing; Client sends commands to
// their devices and follows them to the end.
//
// It imports bridge/wire, google/uuid and the standard library only: bring any MQTT client, or a queue that
// stores publishes. A program that has none takes mqttup.Connect; the folder example is one.
package cloud
