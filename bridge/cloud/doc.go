// Package cloud is the cloud's side of a gateway: Receiver turns what arrives from any number of
// gateways, in any format, into messages, each once, and says what is missing.
//
// It imports bridge/wire and the standard library only: bring any MQTT client, or a queue that
// stores publishes.
package cloud
